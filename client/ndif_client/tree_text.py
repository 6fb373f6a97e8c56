"""A model tree as text and HTML, the way torch prints it, with equal neighbours folded."""

from __future__ import annotations

from html import escape

from ndif_client.wire.messages import ModuleInfo


def tree_text(module: ModuleInfo) -> str:
    """Return what `print(model)` shows: names, classes and sizes; no weights are needed."""
    lines = module.extra.split("\n") if module.extra else []
    single = len(lines) == 1 and not module.children
    if single:
        return f"{module.kind}({lines[0]})"
    for names, child, count in _folded(module):
        body = tree_text(child).replace("\n", "\n  ")
        lines.append(f"({names}): {_times(count)}{body}")
    if not lines:
        return f"{module.kind}()"
    inner = "\n".join(f"  {line}" for line in lines)
    return f"{module.kind}(\n{inner}\n)"


def tree_html(module: ModuleInfo) -> str:
    """Return the same tree as nested, foldable HTML, its first two levels open."""
    return f'<div style="font-family:monospace">{_html("", module, 1, open_levels=2)}</div>'


def _html(names: str, module: ModuleInfo, count: int, open_levels: int) -> str:
    label = f"({escape(names)}): " if names else ""
    extra = f"({escape(module.extra)})" if module.extra or not module.children else ""
    title = f"{label}{_times(count)}<b>{escape(module.kind)}</b>{extra}"
    if not module.children:
        return f'<div style="margin-left:1.2em">{title}</div>'
    inner = "".join(
        _html(name, child, times, open_levels - 1) for name, child, times in _folded(module)
    )
    opened = " open" if open_levels > 0 else ""
    return f'<details style="margin-left:1.2em"{opened}><summary>{title}</summary>{inner}</details>'


def _folded(module: ModuleInfo) -> list[tuple[str, ModuleInfo, int]]:
    """Return the children as (names, child, how many), runs of equal items of a list as one."""
    folded: list[tuple[str, ModuleInfo, int]] = []
    texts: list[str] = []
    for child in module.children:
        text = tree_text(child) if child.name.isdigit() else ""
        if folded and text and texts[-1] == text:
            names, first, count = folded[-1]
            start = names.partition("-")[0]
            folded[-1] = (f"{start}-{child.name}", first, count + 1)
        else:
            folded.append((child.name, child, 1))
            texts.append(text)
    return folded


def _times(count: int) -> str:
    return f"{count} x " if count > 1 else ""
