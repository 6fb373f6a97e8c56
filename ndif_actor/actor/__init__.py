"""Processes that talk: links with typed messages, a thread of their own, supervision, launch.

Nothing here imports torch or knows what a message means.
"""
