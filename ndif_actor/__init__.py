"""The server: one forward pass, many researchers' interventions.

Floors, top to bottom, imports only downward: `cli`, `http`, `coordinator` and `shard`, `engine` and
`actor`, `messages`, `ndif_client.wire`.
"""

__version__ = "0.1.0"
