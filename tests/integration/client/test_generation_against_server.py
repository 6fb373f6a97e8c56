"""Generating through a real server: every token and value is what transformers alone gives."""

from __future__ import annotations

import asyncio
import hashlib
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ndif_client import Result, Session, Token, blocking, connect, errors
from tests.conftest import MakeModel
from tests.integration.server.harness import Server, running

PROMPTS = [
    "The Eiffel Tower is in the city of",
    "Once",
    "A colosseum stands there, as it has for two thousand years, and",
    "one two three",
    "I am not the only one who thinks that this prompt is longer than sixteen bytes",
]

#: Room for 15 pages: about two of the prompts and what follows them.
SMALL_CACHE = ("--cache-bytes", str(16 * 16 * 3 * 2 * 2 * 12 * 8))


class Reference:
    """transformers, and its `generate`."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def generate(self, prompt: str | list[int], steps: int, **options: Any) -> list[int]:
        ids = self.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
        if "bad_words" in settings:
            words = settings.pop("bad_words")
            settings["bad_words_ids"] = [self.tokenizer(word).input_ids for word in words]
        made = self.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=steps,
            **settings,
        )
        tokens: list[int] = made[0, len(ids) :].tolist()
        return tokens

    def hidden(self, ids: list[int], layer: int) -> torch.Tensor:
        """Return the output of a layer for all tokens `[1, sequence, hidden]`."""
        seen: list[torch.Tensor] = []
        handle = self.model.model.layers[layer].register_forward_hook(
            lambda _, args, output: seen.append(output)
        )
        with torch.no_grad():
            self.model(torch.tensor([ids]))
        handle.remove()
        return seen[0]


@pytest.fixture(scope="module")
def folder(model_folder: MakeModel) -> Path:
    return model_folder("llama", torch.float64)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder, torch.float64)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("generation") / "server.log"
    options = ("--dtype", "float64", *SMALL_CACHE, "--log-level", "debug")
    with running(folder, log, *options, "--max-pass-tokens", "64") as server:
        yield server


@pytest.fixture
async def session(server: Server) -> AsyncIterator[Session]:
    async with connect(server.url) as session:
        yield session


# ---------------------------------------------------------------- tokens


async def test_many_at_once_on_a_small_cache_get_the_tokens_of_generate(
    session: Session, server: Server, reference: Reference
) -> None:
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    steps = [20 + 17 * (number % 3) for number in range(len(prompts))]

    results = await asyncio.gather(
        *(
            session.generate(prompt, max_new_tokens=n, eos=False)
            for prompt, n in zip(prompts, steps, strict=True)
        )
    )

    for prompt, n, result in zip(prompts, steps, results, strict=True):
        assert result.new_ids == reference.generate(prompt, n)
        assert result.completion.finish == "length"
        assert result.statistics.forwards >= n
    assert len({result.statistics.forward for result in results}) > 1
    assert "SwapOut(" in server.log.read_text(), "the cache was large enough for all of them"


async def test_a_stream_brings_every_token_as_it_is_made(
    session: Session, reference: Reference
) -> None:
    generation = session.generate(PROMPTS[0], max_new_tokens=10, eos=False)

    tokens: list[Token] = [token async for token in generation]

    result = await generation
    assert [token.id for token in tokens] == result.new_ids == reference.generate(PROMPTS[0], 10)
    assert [token.step for token in tokens] == list(range(10))
    assert "".join(token.text for token in tokens) == result.text
    assert result.text == reference.tokenizer.decode(result.new_ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"logit_bias": {65: 4.0, 66: 4.0}}, {"sequence_bias": {(65,): 4.0, (66,): 4.0}}),
        ({"min_new_tokens": 6, "eos": [70, 118]}, {"min_new_tokens": 6, "eos_token_id": [70, 118]}),
        ({"eos": [139]}, {"eos_token_id": 139}),
    ],
    ids=lambda options: next(iter(options)),
)
async def test_settings_mean_what_they_mean_to_transformers(
    session: Session, reference: Reference, options: dict[str, Any], wanted: dict[str, Any]
) -> None:
    result = await session.generate(PROMPTS[0], max_new_tokens=12, **{"eos": False, **options})

    assert result.new_ids == reference.generate(PROMPTS[0], 12, **wanted)


async def test_bad_words_are_never_generated(session: Session, reference: Reference) -> None:
    free = await session.generate(PROMPTS[0], max_new_tokens=12, eos=False)
    word = next(token for token in free.new_tokens if token.isprintable() and len(token) == 1)

    result = await session.generate(PROMPTS[0], max_new_tokens=12, eos=False, bad_words=[word])

    assert word not in result.text
    assert word in free.text


async def test_a_stop_text_ends_a_generation_and_is_cut_off(session: Session) -> None:
    options = {"max_new_tokens": 40, "eos": False, "temperature": 5.0, "seed": 3}
    free = await session.generate(PROMPTS[0], **options)
    stop = free.text[5:7]

    result = await session.generate(PROMPTS[0], **options, stop=stop)

    assert result.completion.finish == "stop"
    assert result.text == free.text[: free.text.index(stop)]
    assert len(result.new_ids) < 40


async def test_samples_are_repeatable_and_alike_for_nobody_else(session: Session) -> None:
    def sampled(seed: int) -> Any:
        return session.generate(PROMPTS[0], max_new_tokens=12, temperature=1.5, seed=seed)

    first, other, again = await asyncio.gather(sampled(1), sampled(2), sampled(1))
    alone = await sampled(1)

    assert first.new_ids == again.new_ids == alone.new_ids
    assert first.new_ids != other.new_ids


# ---------------------------------------------------------------- interventions


async def test_values_of_all_steps_are_those_of_one_forward_over_the_whole_text(
    session: Session, reference: Reference
) -> None:
    model = session.model
    async with session.generate(PROMPTS[0], max_new_tokens=6, eos=False) as generation:
        prompt = model.model.layers[1].output.save()
        with generation.all():
            last = model.model.layers[1].output[:, -1].save()
        with generation.steps[2:5:2]:
            some = model.model.layers[2].output.save()
        with generation.steps[3]:
            one = model.model.layers[0].output.save()

    result = generation.result
    ids = [*result.token_ids, *result.new_ids]
    length = len(result.token_ids)
    hidden = [reference.hidden(ids[:-1], layer) for layer in range(3)]
    close = {"rtol": 0.0, "atol": 1e-10}
    torch.testing.assert_close(prompt.value, hidden[1][:, :length], **close)
    assert len(last.value) == 6
    for step, value in enumerate(last.value):
        torch.testing.assert_close(value, hidden[1][:, length - 1 + step], **close)
    for step, value in zip((2, 4), some.value, strict=True):
        at = length - 1 + step
        torch.testing.assert_close(value, hidden[2][:, at : at + 1], **close)
    torch.testing.assert_close(one.value, hidden[0][:, length + 2 : length + 3], **close)


async def test_steering_every_step_equals_a_hook_during_generate(
    session: Session, reference: Reference
) -> None:
    direction = torch.linspace(-2, 2, 48, dtype=torch.float64)
    layer = session.model.model.layers[1]
    generations = [session.generate(PROMPTS[0], max_new_tokens=8, eos=False) for _ in range(4)]
    for strength, generation in enumerate(generations):
        with generation, generation.all():
            layer.output[:] += strength * direction

    results: list[Result] = await asyncio.gather(*generations)

    for strength, result in enumerate(results):
        handle = reference.model.model.layers[1].register_forward_hook(
            lambda _, args, output, strength=strength: output + strength * direction
        )
        assert result.new_ids == reference.generate(PROMPTS[0], 8)
        handle.remove()
    assert len({tuple(result.new_ids) for result in results}) > 1


async def test_a_value_saved_at_a_step_that_was_not_reached_says_so(session: Session) -> None:
    free = await session.generate(PROMPTS[0], max_new_tokens=8, eos=False)
    layer = session.model.model.layers[0]

    async with session.generate(PROMPTS[0], max_new_tokens=8, eos=free.new_ids[2]) as generation:
        with generation.all():
            each = layer.output.save()
        with generation.steps[7]:
            late = layer.output.save()

    assert generation.result.completion.finish == "eos"
    assert len(each.value) == len(generation.result.new_ids) <= 3
    with pytest.raises(errors.NoValueError, match="before step 7"):
        _ = late.value


def test_the_blocking_form_streams_too(server: Server, reference: Reference) -> None:
    with blocking.connect(server.url) as session:
        generation = session.generate(PROMPTS[1], max_new_tokens=5, eos=False)

        ids = [token.id for token in generation]

    assert ids == reference.generate(PROMPTS[1], 5)


# ---------------------------------------------------------------- others


async def test_cancelling_a_generation_leaves_the_others_and_frees_its_pages(
    session: Session, reference: Reference
) -> None:
    other = session.generate(PROMPTS[2], max_new_tokens=20, eos=False)
    for _ in range(8):  # together, they need more pages than there are
        generation = session.generate(PROMPTS[4], max_new_tokens=60, eos=False)
        async for token in generation:
            if token.step == 2:
                break
        await generation.cancel()
        with pytest.raises(errors.TraceCancelledError):
            await generation

    assert (await other).new_ids == reference.generate(PROMPTS[2], 20)


async def test_what_can_never_fit_is_refused_with_its_size(session: Session) -> None:
    with pytest.raises(errors.LimitError, match="max_new_tokens=200"):
        await session.generate(PROMPTS[4] * 2, max_new_tokens=200)
    with pytest.raises(errors.LimitError, match="KV cache"):
        await session.generate([PROMPTS[4]] * 6, max_new_tokens=100)


async def test_solo_has_every_bit_of_a_run_alone(
    folder: Path, model_folder: MakeModel, tmp_path: Path
) -> None:
    folder = model_folder("llama", torch.float32)
    with running(folder, tmp_path / "log", "--dtype", "float32") as server:
        async with connect(server.url) as session:

            def traced(numerics: str) -> Any:
                return session.trace(
                    PROMPTS[0], lambda m: {"h": m.lm_head.output}, numerics=numerics
                )

            def generated(numerics: str) -> Any:
                return session.generate(
                    PROMPTS[0],
                    lambda m: {"h": m.lm_head.output},
                    max_new_tokens=5,
                    eos=False,
                    numerics=numerics,
                )

            alone = await traced("fast"), await generated("fast")
            others = [session.generate(p, max_new_tokens=20, eos=False) for p in PROMPTS]
            crowd = asyncio.gather(*others)
            solo = await asyncio.gather(traced("solo"), generated("solo"))
            await crowd

    for found, wanted in zip(solo, alone, strict=True):
        assert found.statistics.numerics == "solo"
        assert found.statistics.groups == 1
        assert wanted.statistics.numerics == "fast"
        assert torch.equal(found.h, wanted.h)


async def test_a_prompt_begun_before_is_found_in_the_cache_of_its_own_user_only(
    folder: Path, tmp_path: Path, reference: Reference
) -> None:
    keys = tmp_path / "keys"
    names = ("ann", "bob")
    keys.write_text("".join(f"{n} {hashlib.sha256(n.encode()).hexdigest()}\n" for n in names))
    long = PROMPTS[4]
    for share in (False, True):
        options = ["--dtype", "float64", "--api-key-file", str(keys)]
        options += ["--share-prefixes"] if share else []
        with running(folder, tmp_path / "log", *options) as server:
            async with (
                connect(server.url, api_key="ann") as ann,
                connect(server.url, api_key="bob") as bob,
            ):
                async with ann.generate(long, max_new_tokens=4, eos=False) as steered:
                    ann.model.model.layers[0].output[:] = 0.5
                first = await ann.generate(long, max_new_tokens=4, eos=False)
                again = await ann.generate(long + " and more", max_new_tokens=4, eos=False)
                other = await bob.generate(long, max_new_tokens=4, eos=False)

        cached = [each.statistics.cached_tokens for each in (first, again, other)]
        assert cached == [0, 64, 64 if share else 0]
        assert steered.result.new_ids != first.new_ids == other.new_ids
        assert first.new_ids == reference.generate(long, 4)
        assert again.new_ids == reference.generate(long + " and more", 4)


async def test_a_killed_shard_fails_its_generations_and_serves_the_next(
    folder: Path, tmp_path: Path, reference: Reference
) -> None:
    with running(folder, tmp_path / "log", "--dtype", "float64") as server:
        async with connect(server.url) as session:
            generation = session.generate(PROMPTS[0], max_new_tokens=200, eos=False)
            async for token in generation:
                if token.step == 3:
                    server.shards()[0].kill()
                    break
            with pytest.raises(errors.UnavailableError, match="send the request again"):
                await generation

            for _ in range(100):
                try:
                    result = await session.generate(PROMPTS[1], max_new_tokens=5, eos=False)
                    break
                except errors.UnavailableError:
                    await asyncio.sleep(0.3)

    assert result.new_ids == reference.generate(PROMPTS[1], 5)


async def test_shards_generate_what_one_process_does(
    folder: Path, tmp_path: Path, reference: Reference
) -> None:
    with running(folder, tmp_path / "log", "--dtype", "float64", "--tp", "2") as server:
        async with connect(server.url) as session:
            layer = session.model.model.layers[1]
            async with session.generate(PROMPTS[0], max_new_tokens=6, eos=False) as generation:
                with generation.steps[1:]:
                    gate = layer.mlp.gate_proj.output.save()
            others = await asyncio.gather(
                *(session.generate(prompt, max_new_tokens=9, eos=False) for prompt in PROMPTS)
            )

    assert [value.shape for value in gate.value] == [(1, 1, 80)] * 5
    assert generation.result.new_ids == reference.generate(PROMPTS[0], 6)
    for prompt, result in zip(PROMPTS, others, strict=True):
        assert result.new_ids == reference.generate(prompt, 9)


async def test_a_draining_server_finishes_what_it_generates(
    folder: Path, tmp_path: Path, reference: Reference
) -> None:
    with running(folder, tmp_path / "log", "--dtype", "float64") as server:
        async with connect(server.url) as session:
            generation = session.generate(PROMPTS[0], max_new_tokens=60, eos=False)
            async for token in generation:
                if token.step == 2:
                    server.signal(signal.SIGTERM)
                    break

            result = await generation

        assert result.new_ids == reference.generate(PROMPTS[0], 60)
        assert server.wait() == 0


async def test_the_demo_model_chats_as_transformers_does(smollm2: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Name the capital of France."}]
    reference = Reference(smollm2, torch.float32)
    ids = reference.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    with running(smollm2, tmp_path / "log", "--dtype", "float32") as server:
        async with connect(server.url) as session:
            chat, plain = await asyncio.gather(
                session.generate(messages=messages, max_new_tokens=24),
                session.generate(PROMPTS[0], max_new_tokens=12, eos=False),
            )

    end = reference.tokenizer.eos_token_id
    assert chat.token_ids == ids
    assert chat.new_ids == reference.generate(ids, 24, eos_token_id=end)
    assert "Paris" in chat.text and chat.completion.finish == "eos"
    assert plain.new_ids == reference.generate(PROMPTS[0], 12)
