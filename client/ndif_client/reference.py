"""The reference page of all operations and verbs, made from the catalogue and the docstrings.

python -m ndif_client.reference > docs/reference.md
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from ndif_client.arguments import usage
from ndif_client.attention import Heads
from ndif_client.caching import Cache
from ndif_client.chain import Chain
from ndif_client.edits import Edit, Edits
from ndif_client.envoy import Envoy
from ndif_client.generation import Generation
from ndif_client.lora import LoRA
from ndif_client.optim import SGD, Adam, AdamW
from ndif_client.proxy import Proxy
from ndif_client.results import Result
from ndif_client.scanning import Scan
from ndif_client.session import Session
from ndif_client.trace import Trace
from ndif_client.wire.catalogue import ALIASES, CATALOGUE, Op

#: Classes whose public members are verbs, with the title of each.
_CLASSES: tuple[tuple[type, str], ...] = (
    (Session, "A session"),
    (Trace, "A trace"),
    (Generation, "A generation, besides what a trace has"),
    (Envoy, "A module"),
    (Heads, "Heads of an attention"),
    (Proxy, "A value"),
    (Result, "A result"),
    (Cache, "A cache"),
    (Scan, "A scan"),
    (Edit, "An edit"),
    (Edits, "The edits of a session"),
    (Chain, "A chain"),
    (LoRA, "A LoRA adapter"),
    (SGD, "SGD"),
    (Adam, "Adam"),
    (AdamW, "AdamW"),
)

_PREFACE = """# Reference

Made by `python -m ndif_client.reference`; a test keeps it up to date. `docs/guide.md` shows how the
parts work together.
"""


def reference() -> str:
    """Return the page, in Markdown."""
    parts = [_PREFACE, "## Verbs\n"]
    for cls, title in _CLASSES:
        parts += [f"### {title}: `{cls.__name__}`\n", *_members(cls)]
    parts += ["## Operations\n", _OPERATIONS, *_operations()]
    return "\n".join(parts).rstrip() + "\n"


_OPERATIONS = """Torch's, by torch's names and arguments: `ops.name(...)`, and `value.name(...)`
for those marked *m*. *d*: gradients flow through it.

| operation | | what |
|---|---|---|"""


def _operations() -> Iterator[str]:
    aliases: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        aliases.setdefault(name, []).append(alias)
    for op in sorted(CATALOGUE.values(), key=lambda op: op.name):
        also = f" Also `{'`, `'.join(sorted(aliases[op.name]))}`." if op.name in aliases else ""
        yield f"| `{usage(op)}` | {_marks(op)} | {op.doc}{also} |"


def _marks(op: Op) -> str:
    return " ".join(mark for mark, on in (("m", op.method), ("d", op.differentiable)) if on)


def _members(cls: type) -> Iterator[str]:
    own = cls.__doc__ or ""
    yield f"{own.strip().splitlines()[0]}\n"
    known = {op.name for op in CATALOGUE.values()} | set(ALIASES)
    shown = {base for each, _ in _CLASSES if cls is not each and issubclass(cls, each)
             for base in each.__mro__}  # fmt: skip
    mine = [b for b in cls.__mro__ if b not in shown and b.__module__.startswith("ndif_client.")]
    for name, member in (pair for base in mine for pair in vars(base).items()):
        if name.startswith("_") or (cls is Proxy and name.rstrip("_") in known):
            continue
        doc = inspect.getdoc(_unwrapped(member))
        if doc:
            yield f"- `{_shown(name, member)}`: {_first_sentence(doc)}"
    yield ""


def _unwrapped(member: Any) -> Any:
    if isinstance(member, property):
        return member.fget
    return member.__func__ if isinstance(member, classmethod | staticmethod) else member


def _shown(name: str, member: Any) -> str:
    function = _unwrapped(member)
    if isinstance(member, property) or not callable(function):
        return name
    parameters = [
        f"{'*' if p.kind is p.VAR_POSITIONAL else '**' if p.kind is p.VAR_KEYWORD else ''}{p.name}"
        for p in inspect.signature(function).parameters.values()
        if p.name not in ("self", "cls")
    ]
    return f"{name}({', '.join(parameters)})"


def _first_sentence(doc: str) -> str:
    return " ".join(doc.split("\n\n", maxsplit=1)[0].split())


if __name__ == "__main__":
    print(reference(), end="")
