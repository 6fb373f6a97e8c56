"""What a value is can be asked while its trace is being written."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest
import torch

from ndif_client import Session, connect, errors
from tests.conftest import MakeModel
from tests.integration.server.harness import running

TEXT = "The Eiffel Tower is in"


@pytest.fixture(scope="module")
def url(model_folder: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("facts") / "log"
    with running(model_folder("gpt2", torch.float32), log, "--dtype", "float32") as server:
        yield server.url


@pytest.fixture
async def session(url: str) -> AsyncIterator[Session]:
    async with connect(url, tensors="torch") as session:
        yield session


async def test_shapes_are_those_that_come_back(session: Session) -> None:
    async with session.trace([TEXT, "Rome"]) as trace:
        h = session.model.layers[1].resid
        product = h[:, -1] @ h[:, 0].mT
        pattern = session.model.layers[1].attn.pattern
        known = {"h": h.shape, "product": product.shape, "pattern": pattern.shape}
        batch, tokens, hidden = h.shape
        assert (h.ndim, h.dim(), h.numel()) == (3, 3, batch * tokens * hidden)
        assert h.size(-1) == len(h[0, 0]) == hidden
        assert (h > 0).dtype == torch.bool
        assert h.dtype == torch.float32
        assert product.is_floating_point()
        trace.h, trace.product, trace.pattern = h, product, pattern
    for name, shape in known.items():
        assert isinstance(shape, torch.Size)
        assert shape == trace.result[name].shape


async def test_they_can_be_computed_with(session: Session) -> None:
    async with session.trace(TEXT) as trace:
        h = session.model.layers[0].resid
        mask = torch.zeros(h.shape, dtype=h.dtype, device=h.device)
        mask[:, ::2] = 1
        trace.masked = h * mask
        trace.scaled = h / h.shape[-1] ** 0.5
        trace.rows = [row.norm() for row in h[0]]
        query, key, _ = session.model.transformer.h[1].attn.c_attn.output.split(48, dim=2)
        trace.product = query @ key.mT
        trace.h = h
    h = trace.result.h
    assert torch.equal(trace.result.masked[:, 1::2], torch.zeros_like(h[:, 1::2]))
    assert torch.equal(trace.result.masked[:, ::2], h[:, ::2])
    torch.testing.assert_close(trace.result.scaled, h / 48**0.5)
    torch.testing.assert_close(torch.stack(trace.result.rows), h[0].norm(dim=-1))
    assert trace.result.product.shape == (1, h.shape[1], h.shape[1])


async def test_what_is_asked_twice_of_a_hook_point_is_answered_without_the_server(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    twin = session._transport.twin
    monkeypatch.setattr(session._transport, "twin", lambda: (asked.append(1), twin())[1])
    async with session.trace([5, 7, 9]) as trace:
        trace.h = session.model.layers[0].resid
        assert trace.h.shape == (1, 3, 48)
    assert not asked
    async with session.trace(TEXT) as trace:
        shapes = {layer.resid.shape for layer in session.model.layers}
        trace.h = session.model.layers[0].resid
    assert len(shapes) == len(asked) == 1


async def test_a_mask_of_ones_own_chooses_rows(session: Session) -> None:
    mask = torch.tensor([True, False, True])
    async with session.trace([5, 7, 9]) as trace:
        h = session.model.layers[1].resid
        trace.before = h.clone()
        trace.chosen = h[:, mask]
        trace.pairs = h[0][np.array([[True] * 48, [False] * 48, [True] * 48])]
        h[:, mask] = torch.ones(2, 48)
        trace.after = h
        with pytest.raises(errors.GraphError, match=r"a mask of \[2\] for .*\[3\]"):
            h[:, torch.tensor([True, False])]
    result = trace.result
    assert torch.equal(result.chosen, result.before[:, mask])
    assert torch.equal(result.pairs, result.before[0][mask].flatten())
    assert torch.equal(result.after[:, mask], torch.ones(1, 2, 48))
    assert torch.equal(result.after[:, 1], result.before[:, 1])


async def test_what_has_no_one_shape_says_so(session: Session) -> None:
    with session.generate(TEXT, max_new_tokens=4) as generation:
        with generation.all(), pytest.raises(errors.ValueUnknownError, match="all steps"):
            session.model.layers[0].resid.save().shape  # noqa: B018
        with generation.steps[1:]:
            assert session.model.layers[0].resid.shape == (1, 1, 48)
            with pytest.raises(errors.ValueUnknownError, match="need not have one shape"):
                session.model.layers[0].attn.pattern.sum(-1).shape  # noqa: B018
    assert (await generation).text is not None
    with session.edit("doubled"):
        session.model.layers[0].resid *= 2
        with pytest.raises(errors.ValueUnknownError, match="with prompts"):
            session.model.layers[0].resid.shape  # noqa: B018


async def test_what_can_never_run_is_said_where_it_is_asked(session: Session) -> None:
    trace = session.trace(TEXT)
    with trace, pytest.raises(errors.GraphError, match=r"matmul.*\n.*h @ h"):
        h = session.model.layers[0].resid
        bad = h @ h
        bad.shape  # noqa: B018
    await trace.cancel()


async def test_a_held_value_knows_its_shape(session: Session) -> None:
    held = await session.upload(np.ones((3, 48), np.float32))
    assert held.shape == (3, 48)
    async with session.trace(TEXT) as trace:
        trace.sums = [row.sum() for row in held]
        assert len(held) == 3
    assert [float(value) for value in trace.result.sums] == [48, 48, 48]


async def test_in_a_chain_shapes_are_known_of_what_is_there(session: Session) -> None:
    weight = await session.upload(np.ones((48, 3), np.float32), "weight")
    async with session.chain() as chain:
        for text in (TEXT, "Rome"):
            with chain.trace(text) as trace:
                h = session.model.layers[1].resid
                trace.scaled = h / h.shape[-1]
                trace.scores = h[:, -1] @ weight
                assert trace.scores.shape == (1, 3)
                (weight * 2).keep("weight")
                trace.scores.sum(0).keep("sum")
        with chain.trace() as trace:
            total = session.held("sum") + 1
            trace.total = total
            with pytest.raises(errors.ValueUnknownError, match="chain that has not begun"):
                total.shape  # noqa: B018
    assert chain.results[-1].total.shape == (3,)


async def test_shapes_can_be_asked_of_what_saves_nothing(session: Session) -> None:
    with session.trace(TEXT) as trace:
        h = session.model.layers[0].resid
    assert (await trace.scan()).shape_of(h)[-1] == 48
    with pytest.raises(errors.GraphError, match="saves nothing"):
        await trace
