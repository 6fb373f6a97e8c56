"""Figures of single parts, without a server."""
