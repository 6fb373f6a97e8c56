"""The documentation's code runs as it stands."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.server.harness import running

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"


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


def _run_example(name: str, *arguments: str, folder: Path | None = None) -> str:
    """Run a script of docs/examples as a reader would, in a folder; return what it printed."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def demo_url(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the demo model in float32, in which no finding hangs on rounding."""
    log = tmp_path_factory.mktemp("docs") / "server.log"
    with running(smollm2, log, "--dtype", "float32") as server:
        yield server.url


@pytest.fixture(scope="module")
def main_job(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the README's first command prints, and the folder it leaves its picture in."""
    folder = tmp_path_factory.mktemp("main-job")
    return _run_example("three_researchers.py", "--output", str(folder)), folder


@pytest.mark.timeout(300)
def test_three_researchers_say_what_their_numbers_show(main_job: tuple[str, Path]) -> None:
    said, _ = main_job

    rows = re.findall(r"^ +\d+ \| (.+)$", said, flags=re.MULTILINE)
    differences = [float(number) for row in rows for number in row.split()]
    patched = re.search(r"step is at layer (\d+), from .*; Paris leads from layer (\d+) on", said)
    assert patched is not None
    jump, turn = int(patched[1]), int(patched[2])
    assert len(differences) == 30
    assert jump == 23  # what plain transformers with plain hooks finds, in float32 as in bfloat16
    assert min(differences[turn:]) >= 0 >= differences[turn - 1]
    assert re.search(r"before: +\[' Paris'", said)
    assert re.search(r"without MLP +\d+: +\[(?!' Paris')", said)


@pytest.mark.timeout(300)
def test_three_researchers_share_forwards_and_leave_a_picture(
    main_job: tuple[str, Path],
) -> None:
    said, folder = main_job

    shared = re.search(r"(\d+) requests of three researchers ran in (\d+) forward", said)
    assert shared is not None
    assert int(shared[1]) == 1 + 30 + 31
    assert int(shared[2]) <= 8
    by_forward = re.findall(r"^ +forward \d+: (.+)$", said, flags=re.MULTILINE)
    assert len(by_forward) == int(shared[2])
    assert sum(int(n) for line in by_forward for n in re.findall(r"(\d+) of", line)) == 62
    picture = (folder / "logit_lens.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_the_logit_lens_example_finds_paris_only_late(demo_url: str) -> None:
    said = _run_example("logit_lens.py", demo_url)

    guesses = re.findall(r"^  layer +\d+  '(.*)'$", said, flags=re.MULTILINE)
    assert len(guesses) == 30
    assert guesses[-1] == " Paris"
    assert " Paris" not in guesses[:20]


def test_the_patching_example_agrees_with_plain_hooks(demo_url: str, smollm2: Path) -> None:
    said = _run_example("activation_patching.py", demo_url)

    shown = [float(x) for x in re.findall(r"after layer +\d+ +(\S+)$", said, flags=re.MULTILINE)]
    assert shown == pytest.approx(_patched_with_plain_hooks(smollm2), abs=0.006)  # 2 decimals
    assert re.search(r"30 traces ran in \d forward", said)


def test_the_ablation_example_loses_paris(demo_url: str) -> None:
    said = _run_example("ablation.py", demo_url)

    assert re.search(r"nothing +\[' Paris'", said)
    assert re.search(r"its attention +\[(?!' Paris')", said)
    assert re.search(r"its MLP +\[(?!' Paris')", said)


def test_the_patching_grid_finds_where_the_name_travels(demo_url: str, tmp_path: Path) -> None:
    said = _run_example("patching_grid.py", demo_url, folder=tmp_path)

    rows = re.findall(r"layer +(\d+): +(\d+)% at '(.+)' \(token (\d+)\)", said)
    assert len(rows) == 10
    at = {int(layer): int(token) for layer, _, _, token in rows}
    assert at[2] == at[11] == 9, "early, it lies at the second mention of a name"
    assert at[26] == at[29] == 13, "late, at the last token"
    assert re.search(r"140 patched runs in one forward, (4[0-9]|50)% of", said)
    assert (tmp_path / "patching_grid.png").read_bytes().startswith(b"\x89PNG")


def test_steering_turns_what_the_model_writes(demo_url: str) -> None:
    said = _run_example("steered_generation.py", demo_url)

    texts = dict(re.findall(r"^ +([+-]\d)  ['\"](.+)['\"]$", said, flags=re.MULTILINE))
    assert list(texts) == ["-6", "-3", "+0", "+3", "+6"]
    assert re.search(r"bad|terrible|awful", texts["-6"] + texts["-3"])
    assert re.search(r"amazing|great|delicious", texts["+3"] + texts["+6"])
    assert "5 generations began in 1 forward(s)" in said


def _patched_with_plain_hooks(folder: Path) -> list[float]:
    """Return logit(Paris) - logit(Rome) per patched layer, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    clean, corrupted = (
        tokenizer(f"The {sight} is in the city of", return_tensors="pt").input_ids
        for sight in ("Eiffel Tower", "Colosseum")
    )
    paris, rome = (tokenizer(city).input_ids[0] for city in (" Paris", " Rome"))
    with torch.inference_mode():
        streams = model(clean, output_hidden_states=True).hidden_states
        differences = []
        for number, layer in enumerate(model.model.layers[:-1]):

            def patch(_: object, __: object, output: torch.Tensor, number: int = number) -> None:
                output[:, -1] = streams[number + 1][:, -1]

            hook = layer.register_forward_hook(patch)
            logits = model(corrupted).logits[0, -1]
            hook.remove()
            differences.append(float(logits[paris] - logits[rome]))
        # Patched after the last layer, the last position is the clean prompt's.
        logits = model(clean).logits[0, -1]
    return [*differences, float(logits[paris] - logits[rome])]


def test_the_readme_names_the_commands_that_ci_runs() -> None:
    readme = (ROOT / "README.md").read_text()

    assert "pip install tox && tox" in readme
    assert "tox" in (ROOT / ".ci" / "run").read_text()
