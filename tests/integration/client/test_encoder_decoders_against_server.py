"""T5 behind a real server: what its decoder reads is given beside each prompt."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from ndif_client import Session, blocking, connect, errors
from tests.conftest import MakeModel
from tests.integration.server.harness import Server, running

PROMPT, DECODER = "translate: a house", "ein Haus"


@pytest.fixture(scope="module")
def folder(model_folder: MakeModel) -> Path:
    return model_folder("t5", torch.float64)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(folder, tmp_path_factory.mktemp("server") / "log") as server:
        yield server


@pytest.fixture
async def session(server: Server) -> AsyncIterator[Session]:
    async with connect(server.url) as session:
        yield session


def logits(folder: Path, prompt: str, decoder: str) -> np.ndarray:
    """What transformers gives a prompt and the start of what its decoder reads."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = [0, *tokenizer(decoder, add_special_tokens=False).input_ids]
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor([tokenizer(prompt).input_ids]),
            decoder_input_ids=torch.tensor([target]),
        )
    found: np.ndarray = output.logits.numpy()
    return found


async def test_texts_for_the_decoder_follow_its_first_token(session: Session, folder: Path) -> None:
    async with session.trace(PROMPT, decoder=DECODER) as trace:
        trace.logits = session.model.lm_head.output

    np.testing.assert_allclose(trace.result.logits, logits(folder, PROMPT, DECODER), atol=1e-10)


async def test_without_any_the_decoder_reads_its_first_token(
    session: Session, folder: Path
) -> None:
    async with session.trace([PROMPT, "x"]) as trace:
        trace.logits = session.model.lm_head.output

    assert trace.result.logits.shape == (2, 1, 300)
    np.testing.assert_allclose(trace.result.logits[:1], logits(folder, PROMPT, ""), atol=1e-10)
    np.testing.assert_allclose(trace.result.logits[1:], logits(folder, "x", ""), atol=1e-10)


async def test_invokes_have_decoder_prompts_of_their_own(session: Session, folder: Path) -> None:
    block = session.model.encoder.block[1]
    with session.trace() as trace:
        with trace.invoke(PROMPT, decoder=DECODER):
            hidden = block.output[0]
            trace.first = session.model.lm_head.output
        with trace.invoke("translate: a mouse", decoder=[0, 50, 60]):
            block.output[0] = hidden
            trace.second = session.model.lm_head.output
    scan = await trace.scan()
    await trace

    assert scan.shape_of(hidden) == (1, len(PROMPT), 48)
    assert trace.result.second.shape == (1, 3, 300)
    np.testing.assert_allclose(trace.result.first, logits(folder, PROMPT, DECODER), atol=1e-10)


async def test_what_the_decoder_can_not_read_is_refused(session: Session) -> None:
    with pytest.raises(errors.GraphError, match="has 2 prompts, the encoder 1; give one for each"):
        session.trace(PROMPT, decoder=["a", "b"])
    with pytest.raises(errors.GraphError, match=r"decoder=\.\.\. goes with a prompt"):
        session.trace(decoder="a")
    with pytest.raises(errors.GraphError, match="decoder prompt 0 of invoke 0 has token id 300"):
        await session.trace(PROMPT, lambda m: {"y": m.lm_head.output}, decoder=[300])
    with pytest.raises(errors.LimitError, match="generation needs a model whose requests can"):
        await session.generate(PROMPT)


def test_the_blocking_client_gives_the_decoder_its_prompts_too(server: Server) -> None:
    with blocking.connect(server.url) as session:
        with session.trace() as trace, trace.invoke(PROMPT, decoder=DECODER):
            trace.logits = session.model.lm_head.output
        assert trace.result.logits.shape == (1, 1 + len(DECODER), 300)
