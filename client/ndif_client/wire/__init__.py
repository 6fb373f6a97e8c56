"""What client, coordinator and shards share: frames, tensors, graph, catalogue, messages.

Nothing here imports torch, opens a socket or knows who is talking.
"""
