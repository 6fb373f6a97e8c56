"""What a user would pick instead, what it is installed from, and what of it can run here."""

from __future__ import annotations

import msgspec


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """One of them.

    Attributes:
        name: on the command line and in tables.
        meaning: what it is, for people.
        script: the module in `scripts/` that runs it; None if there is none.
        environment: which of `requirements/` it needs.
        scenarios: those of `bench.load.scenarios` that it runs; None for all.
        missing: why it does not run, where `script` is None.
    """

    name: str
    meaning: str
    script: str | None = None
    environment: str = ""
    scenarios: tuple[str, ...] | None = None
    missing: str = ""


_NO_GPU = "needs a CUDA device, and its script was never written for want of one"

PEERS = (
    Peer(
        name="plain-hooks",
        meaning="transformers with PyTorch's own hooks",
        script="plain_hooks",
        environment="nnsight",
    ),
    Peer(
        name="nnsight",
        meaning="nnsight, local",
        script="nnsight_local",
        environment="nnsight",
    ),
    Peer(
        name="transformer-lens",
        meaning="TransformerLens's bridge, local",
        script="transformer_lens_bridge",
        environment="transformer-lens",
    ),
    Peer(
        name="pyvene",
        meaning="pyvene, local",
        script="pyvene_local",
        environment="pyvene",
        scenarios=("hidden-states", "patching"),
    ),
    Peer(
        name="ndif-floor",
        meaning="nnsight in a Ray actor, one request at a time: NDIF without all it adds to that",
        script="ndif_floor",
        environment="nnsight",
    ),
    Peer(name="ndif", meaning="NDIF 0.1.2", missing=_NO_GPU),
    Peer(name="vllm-lens", meaning="vllm-lens on vLLM", missing=_NO_GPU),
    Peer(name="nnsight-vllm", meaning="nnsight on vLLM", missing=_NO_GPU),
)


def find(names: str) -> list[Peer]:
    """Return the peers of these names, separated by commas; all of them for "all".

    Raises:
        ValueError: there is none of a name.
    """
    known = {peer.name: peer for peer in PEERS}
    if names == "all":
        return list(PEERS)
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise ValueError(f"no peer {name!r}; there are {', '.join(known)}")
    return [known[name] for name in wanted]
