"""The documentation's code runs as it stands."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _blocks(page: Path) -> str:
    """Return all Python blocks of a page as one program, lines numbered as on the page."""
    lines = page.read_text().split("\n")
    inside, program = False, []
    for line in lines:
        if line.startswith("```"):
            inside = line == "```python"
            program.append("")
        else:
            program.append(line if inside else "")
    return "\n".join(program)


@pytest.mark.timeout(240)
async def test_every_block_of_the_guide_runs_in_order(smollm2: Path) -> None:
    page = ROOT / "docs" / "guide.md"
    program = _blocks(page)
    code = compile(program, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    names: dict[str, object] = {"__name__": "guide"}

    running = eval(code, names)  # the page itself, not anything from outside
    await running

    assert names["states"][-1] == "done"  # type: ignore[index]
    assert names["after"].value > names["before"].value  # type: ignore[attr-defined]


@pytest.mark.timeout(300)
def test_three_researchers_find_what_they_look_for(smollm2: Path, tmp_path: Path) -> None:
    script = ROOT / "docs" / "examples" / "three_researchers.py"

    done = subprocess.run(
        [sys.executable, str(script), "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert "turns to Paris" in done.stdout
    assert "without MLP" in done.stdout
    shared = re.search(r"(\d+) requests of three researchers ran in (\d+) forward", done.stdout)
    assert shared is not None
    assert int(shared[1]) >= 60
    assert int(shared[2]) <= 8
    picture = (tmp_path / "logit_lens.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_the_readme_names_the_commands_that_ci_runs() -> None:
    readme = (ROOT / "README.md").read_text()

    assert "pip install tox && tox" in readme
    assert "tox" in (ROOT / ".ci" / "run").read_text()
