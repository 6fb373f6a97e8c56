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

from ndif_client.reference import reference
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
async def test_every_block_of_the_guide_runs_in_order(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # it saves files
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


def _numbers(pattern: str, said: str) -> list[float]:
    """Return the numbers that a pattern's groups find, each of which must be there."""
    found = re.search(pattern, said)
    assert found is not None, said
    return [float(group) for group in found.groups()]


def test_attribution_patching_agrees_with_patching_late(demo_url: str) -> None:
    said = _run_example("attribution_patching.py", demo_url)

    shown = [float(x) for x in re.findall(r"after layer +\d+ +(\S+)$", said, flags=re.MULTILINE)]
    assert len(shown) == 30
    assert max(map(abs, shown[:18])) < 1 < 5 < min(shown[23:])


def test_direct_logit_attribution_adds_up(demo_url: str) -> None:
    said = _run_example("direct_logit_attribution.py", demo_url)

    whole, parts = _numbers(r"= (\S+); the sum of all parts = (\S+)", said)
    assert parts == pytest.approx(whole, abs=0.02)
    assert "attention 23" in said


def test_path_patching_tells_direct_effects_from_others(demo_url: str) -> None:
    said = _run_example("path_patching.py", demo_url)

    everything, direct = _numbers(r"layer 23: +(\S+) by all paths, +(\S+) directly", said)
    assert everything > 5 and 3 < direct < everything


def test_causal_tracing_finds_the_late_site(demo_url: str) -> None:
    said = _run_example("causal_tracing.py", demo_url)

    clean, noisy = _numbers(r"p\(Paris\): (\S+), with a blurred subject (\S+)", said)
    (late,) = _numbers(r"last token .* 27: (\S+)", said)
    assert noisy < 0.1 < 0.3 < late <= clean


def test_head_ablation_runs_all_heads_in_one_forward(demo_url: str) -> None:
    said = _run_example("head_ablation.py", demo_url)

    assert "54 ablations in one forward" in said
    assert len(re.findall(r"^  \d+\.\d +[+-]", said, flags=re.MULTILINE)) == 6


def test_attention_patterns_are_distributions(demo_url: str) -> None:
    said = _run_example("attention_pattern.py", demo_url)

    assert len(re.findall(r"^  head \d", said, flags=re.MULTILINE)) == 9
    assert "rows add up to 1.000" in said


def test_induction_heads_are_found(demo_url: str) -> None:
    said = _run_example("induction_heads.py", demo_url)

    assert _numbers(r"layer 18, head 6: (\S+)", said)[0] > 0.7


def test_gradients_and_edited_gradients_are_shown_by_token(demo_url: str) -> None:
    assert len(re.findall(r"norm +\d", _run_example("gradients.py", demo_url))) == 9
    rows = re.findall(r"' +(\S+) +(\S+)$", _run_example("gradient_editing.py", demo_url), re.M)
    assert len(rows) == 9 and all(float(whole) != float(edited) for whole, edited in rows)


def test_integrated_gradients_nearly_add_up(demo_url: str) -> None:
    said = _run_example("integrated_gradients.py", demo_url)

    change, shares = _numbers(r"rises by (\S+); the shares add up to (\S+)", said)
    assert shares == pytest.approx(change, rel=0.35)


def test_all_edges_are_estimated_at_once(demo_url: str) -> None:
    assert "66 edges between MLPs" in _run_example("edge_attribution.py", demo_url)


def test_a_contrast_vector_changes_what_is_written(demo_url: str) -> None:
    texts = re.findall(r"^ +[+-]\d\.0  (.+)$", _run_example("steering_vector.py", demo_url), re.M)

    assert len(set(texts)) == 3


def test_a_patchscope_reads_paris_off_a_state(demo_url: str) -> None:
    said = _run_example("patchscopes.py", demo_url)

    assert re.search(r"after layer 8 +\[' Paris'", said)


def test_a_function_vector_moves_towards_opposites(demo_url: str) -> None:
    said = _run_example("function_vectors.py", demo_url)

    ranks = [words.split(", ") for words in re.findall(r"\[(.+)\]", said)]
    before, after = (list(words).index("' late'") for words in ranks[:2])
    assert after < before


def test_resample_ablation_shows_three_ways(demo_url: str) -> None:
    said = _run_example("resample_ablation.py", demo_url)

    assert len(re.findall(r"zero +\S+ +mean +\S+ +resample +\S+", said)) == 6


@pytest.mark.timeout(240)
def test_a_linear_probe_learns_on_the_server(demo_url: str) -> None:
    said = _run_example("linear_probe.py", demo_url)

    assert len(re.findall(r"in 24 steps, [34] of 4 new prompts right", said)) == 3


@pytest.mark.timeout(240)
def test_lora_teaches_a_capital_and_comes_home(demo_url: str) -> None:
    said = _run_example("lora_training.py", demo_url)

    assert re.search(r"after +The capital of Zubrowka is Lutz", said)
    assert not re.search(r"before +The capital of Zubrowka is Lutz", said)
    assert "loaded again: 10 modules" in said


@pytest.mark.timeout(240)
def test_a_tuned_lens_reads_better_than_the_logit_lens(demo_url: str) -> None:
    plain, tuned = _numbers(
        r"logit lens (\S+), tuned lens (\S+)", _run_example("tuned_lens.py", demo_url)
    )

    assert tuned < plain / 2


@pytest.mark.timeout(240)
def test_a_spliced_autoencoder_keeps_the_answer(demo_url: str) -> None:
    said = _run_example("sae_splice.py", demo_url)

    assert _numbers(r"unexplained variance \S+ -> (\S+);", said)[0] < 0.1
    assert re.search(r"spliced .* with \[' Paris'", said)


@pytest.mark.timeout(240)
def test_a_transcoder_takes_the_place_of_an_mlp(demo_url: str) -> None:
    said = _run_example("transcoder_splice.py", demo_url)

    assert _numbers(r"unexplained: \S+ -> (\S+) of", said)[0] < 0.5
    assert re.search(r"transcoded .* with \[' Paris'", said)


@pytest.mark.timeout(240)
def test_das_finds_directions_that_decide(demo_url: str) -> None:
    before, after = _numbers(r"Colosseum: (\S+) -> (\S+)", _run_example("das.py", demo_url))

    assert before < 0 < 5 < after


def test_the_load_request_shares_forwards(demo_url: str) -> None:
    (forwards,) = _numbers(
        r"16 requests ran in (\d+) forward", _run_example("load_request.py", demo_url)
    )

    assert forwards <= 4


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


def test_the_reference_is_that_of_this_version() -> None:
    assert (ROOT / "docs" / "reference.md").read_text() == reference()


def test_the_readme_names_the_commands_that_ci_runs() -> None:
    readme = (ROOT / "README.md").read_text()

    assert "pip install tox && tox" in readme
    assert "tox" in (ROOT / ".ci" / "run").read_text()
