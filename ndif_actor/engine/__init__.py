"""The engine of one shard: a model, its hook points, and the programs that run inside its forward.

It owns torch and transformers and knows no user, socket or process.

    Engine.run_pass -> RaggedBatch (which rows are whose) -> Interleaver (programs at hook points)

A hook point is executed in `interleaver.py`.
"""
