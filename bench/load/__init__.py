"""Figures of a running server: client, coordinator, shard and wire together."""
