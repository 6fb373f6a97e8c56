"""Check and price requests before they may queue: the only place here that knows torch.

Everything runs in one dedicated thread, on meta tensors, so the event loop never waits for it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog
from msgspec.structs import replace

from ndif_actor.actor.thread import WorkThread
from ndif_actor.coordinator import decodings
from ndif_actor.coordinator.capacity import CacheSize
from ndif_actor.coordinator.choice import ModelChoice
from ndif_actor.coordinator.completions import GrowingCompletion
from ndif_actor.coordinator.events import Lane, Ticket
from ndif_actor.coordinator.gathering import MAX_BUFFERS
from ndif_actor.coordinator.outlook import Outlook, check_keeps, check_prompts
from ndif_actor.coordinator.screening import own_buffers, refused, screen
from ndif_actor.errors import RequestError
from ndif_actor.messages import Group
from ndif_client.wire.graph import Chat, HookPoint, Invoke
from ndif_client.wire.messages import (
    Decoding,
    Explanation,
    Fault,
    HeldSpec,
    ModelTree,
    PromptTokens,
    Submission,
    TokenizeReply,
    TraceRequest,
)

if TYPE_CHECKING:
    from ndif_actor.engine.blueprint import Blueprint
    from ndif_actor.engine.shapes import Price
    from ndif_actor.engine.tokens import Tokenizer

_log = structlog.get_logger(__name__)

#: Submissions of more header bytes are decoded in the thread, so that the loop stays responsive.
INLINE_HEADER_BYTES = 64 << 10

#: Seconds of the thread that one submission takes before the others have their turns.
TURN_S = 0.01


class RequestLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one request may cost: its values at their peak, and what it saves, in bytes."""

    value_bytes: int
    saved_bytes: int


class Prepared(msgspec.Struct, frozen=True):
    """An admitted request, ready to join a pass.

    Attributes:
        ticket: what the scheduler needs to know.
        group: token ids and graph; `Constant` nodes point into `buffers`.
        buffers: the bytes of its constants, and of nobody else's.
        prompts: what the client is told about its tokens.
        completions: of a generation, what each of its sequences becomes.
        keeps: what it keeps, by name.
        kept: what it and the unfinished requests keep that it comes after.
    """

    ticket: Ticket
    group: Group
    buffers: list[memoryview]
    prompts: list[list[PromptTokens]]
    completions: list[GrowingCompletion] = []
    keeps: dict[str, HeldSpec] = {}
    kept: Mapping[str, HeldSpec] = {}


class Admission:
    """The model without weights, and the thread that checks requests against it."""

    def __init__(
        self, model_id: str, limits: RequestLimits, *, share_prefixes: bool = False
    ) -> None:
        self._model_id = model_id
        self._limits = limits
        self._share_prefixes = share_prefixes
        #: a number for each user, whose requests may share what is computed for their prompts
        self._sharing: dict[str, int] = {}
        self._cache = CacheSize()
        self._pad = 0
        self._thread = WorkThread("admission")
        self._blueprint: Blueprint
        self._tokenizer: Tokenizer

    async def load(self, choice: ModelChoice, world_size: int) -> None:
        """Build the model without weights.

        Raises:
            ModelError: it can't be served by `world_size` shards, or at all.
        """
        await self._thread.call(self._load, choice, world_size)

    def _load(self, choice: ModelChoice, world_size: int) -> None:
        from ndif_actor.engine.blueprint import Blueprint
        from ndif_actor.engine.tokens import Tokenizer

        folder = Path(choice.folder)
        self._blueprint = Blueprint.load(folder, choice.dtype, world_size)
        self._tokenizer = Tokenizer.load(folder)
        known = self._tokenizer.pad < self._blueprint.vocab_size
        self._pad = self._tokenizer.pad if known else 0
        # What is here now stays: no collection need ever walk it again.
        gc.collect()
        gc.freeze()

    async def withhold(self, withheld: Mapping[str, Sequence[HookPoint]]) -> None:
        """Refuse hook points that the shards can't offer; they come by the reason why."""
        reasons = {point: why for why, points in withheld.items() for point in points}
        await self._thread.call(self._withhold, reasons)

    async def tree(self, device: str, unpackable: str | None) -> ModelTree:
        """Describe the model to clients, as its shards have found it."""
        return await self._thread.call(self._tree, device, unpackable)

    def _withhold(self, reasons: dict[HookPoint, str]) -> None:
        self._blueprint.withhold(reasons)

    def _tree(self, device: str, unpackable: str | None) -> ModelTree:
        return self._blueprint.tree(model_id=self._model_id, device=device, unpackable=unpackable)

    def set_cache(self, cache: CacheSize) -> None:
        """Note what the replica that is ready now has for generations."""
        self._cache = cache

    async def decode(self, header: bytes | bytearray | memoryview) -> Submission:
        """Decode a submission, large ones in the thread.

        Raises:
            msgspec.DecodeError: it is none.
            RequestError: it is nested too deeply to tell.
        """
        try:
            if len(header) <= INLINE_HEADER_BYTES:
                return _decoder.decode(header)
            return await self._thread.call(_decoder.decode, header)
        except RecursionError:
            raise refused("protocol", "the submission is nested too deeply") from None

    async def admit(
        self, submission: Submission, buffers: list[memoryview], user: str, outlook: Outlook
    ) -> list[Prepared | Fault]:
        """Check and price every request of a submission of `user`, in its order.

        Args:
            submission, buffers: as they came.
            user: who sent them.
            outlook: what they may count on; it is this call's own from now on.

        Submissions take turns in the thread, so that a long one does not hold the others up.
        """
        requests = submission.requests
        answers: list[Prepared | Fault] = []
        while len(answers) < len(requests):
            rest = requests[len(answers) :]
            answers += await self._thread.call(self._admit_some, rest, buffers, user, outlook)
        return answers

    async def explain(
        self, submission: Submission, buffers: list[memoryview], user: str, outlook: Outlook
    ) -> list[Explanation]:
        """Say what each request of a submission would cost.

        Raises:
            RequestError: one of them can't run; the fault is the first one's.
        """
        return [
            await self._thread.call(self._explain, request, buffers, user, outlook)
            for request in submission.requests
        ]

    async def tokenize(self, text: str) -> TokenizeReply:
        """Return the ids of `text` and the text of each."""
        return await self._thread.call(self._tokenize, text)

    async def detokenize(self, ids: list[int]) -> TokenizeReply:
        """Return the text of `ids`, together and one by one.

        Raises:
            RequestError: an id is not in the vocabulary.
        """
        return await self._thread.call(self._detokenize, ids)

    async def close(self) -> None:
        """End the thread."""
        await self._thread.close()

    # ------------------------------------------------------------ in the thread

    def _admit_some(
        self,
        requests: list[TraceRequest],
        buffers: list[memoryview],
        user: str,
        outlook: Outlook,
    ) -> list[Prepared | Fault]:
        """Check requests from the front of a list, one at least, for as long as a turn lasts."""
        end_s = time.monotonic() + TURN_S
        answers: list[Prepared | Fault] = []
        for request in requests:
            answer = self._admit_one(request, buffers, user, outlook)
            if isinstance(answer, Fault):
                outlook.note_refused(request, answer)
            answers.append(answer)
            if time.monotonic() > end_s:
                break
        return answers

    def _admit_one(
        self, request: TraceRequest, buffers: list[memoryview], user: str, outlook: Outlook
    ) -> Prepared | Fault:
        try:
            prepared, _ = self._prepare(request, buffers, user, outlook)
            return prepared
        except RequestError as error:
            return error.fault
        except Exception:
            # Our own mistake must not take the neighbours' requests down with it.
            _log.exception("admission failed", request=request.id)
            message = "the server could not check this request (its log says why)"
            return Fault(kind="internal", message=message)

    def _explain(
        self, request: TraceRequest, buffers: list[memoryview], user: str, outlook: Outlook
    ) -> Explanation:
        prepared, price = self._prepare(request, buffers, user, outlook)
        explanation: Explanation = self._blueprint.explain(request.id, prepared.group, price)
        return explanation

    def _prepare(
        self, request: TraceRequest, buffers: list[memoryview], user: str, outlook: Outlook
    ) -> tuple[Prepared, Price]:
        if request.model not in ("", self._model_id):
            raise refused(
                "protocol", f"model {request.model!r} is not served here, {self._model_id!r} is"
            )
        num_saves = screen(request.graph)
        check_prompts(request)
        check_keeps(request)
        outlook.check_after(request)
        held = outlook.held_by(request)
        prompts = [self._prompts(number, invoke) for number, invoke in enumerate(request.invokes)]
        decoder = [self._decoder(number, invoke) for number, invoke in enumerate(request.invokes)]
        if not self._blueprint.has_encoder_and_decoder:
            decoder = []
        sharing = self._sharing_of(user)
        decoding = request.decoding
        if decoding is not None:
            decoding = decodings.resolve(decoding, self._tokenizer, self._blueprint.vocab_size)
            self._check_length(prompts, decoding.max_new_tokens)
        graph, own = own_buffers(request.graph, buffers)
        lengths = [[len(prompt.ids) for prompt in invoke] for invoke in prompts]
        steps = 0 if decoding is None else decoding.max_new_tokens
        decoder_lengths = [[len(ids) for ids in side] for side in decoder]
        price = self._blueprint.check(graph, lengths, own, steps, held, decoder_lengths)
        self._check_price(price)
        group = Group(
            request=request.id,
            invokes=[[prompt.ids for prompt in invoke] for invoke in prompts],
            graph=graph,
            sharing=sharing,
            # What the shards have to know are ids: texts are looked for here.
            decoding=None if decoding is None else replace(decoding, stop=[]),
            decoder=decoder,
            held=held,
        )
        kept = outlook.kept_with(request, price.kept)
        outlook.note_admitted(request.id, kept)
        lane = _lane(request)
        nbytes = price.value_bytes + price.saved_bytes
        if decoding is None:
            ticket = Ticket(request.id, price.tokens, nbytes, num_saves, lane)
            return Prepared(ticket, group, own, prompts, keeps=price.kept, kept=kept), price
        ids = [prompt.ids for invoke in prompts for prompt in invoke]
        ticket = Ticket(
            request=request.id,
            tokens=sum(map(len, ids)),
            # What is saved over all steps leaves the shards with each of them.
            nbytes=min(nbytes, 2 * price.value_bytes),
            tensors=num_saves,
            lane=lane,
            continuation=decodings.continuation(
                graph, ids, decoding, sharing=sharing, alone=lane == "alone", pad=self._pad
            ),
        )
        completions = [self._completion(decoding) for _ in ids]
        return Prepared(ticket, group, own, prompts, completions, price.kept, kept), price

    def _sharing_of(self, user: str) -> int:
        if self._share_prefixes:
            return 0
        return self._sharing.setdefault(user, len(self._sharing))

    def _completion(self, decoding: Decoding) -> GrowingCompletion:
        return GrowingCompletion(
            eos=decoding.eos or [],
            stop=decoding.stop,
            max_new_tokens=decoding.max_new_tokens,
            stream=self._tokenizer.detokenizer(),
            pieces=self._tokenizer.pieces,
        )

    def _prompts(self, number: int, invoke: Invoke) -> list[PromptTokens]:
        found = []
        for index, prompt in enumerate(invoke.prompts):
            place = f"prompt {index} of invoke {number}"
            if isinstance(prompt, str):
                ids = self._tokenizer.encode(prompt)
            elif isinstance(prompt, Chat):
                ids = self._tokenizer.chat(prompt)
            else:
                ids = prompt
            self._check_prompt(ids, place)
            found.append(PromptTokens(ids, self._tokenizer.pieces(ids)))
        return found

    def _decoder(self, number: int, invoke: Invoke) -> list[list[int]]:
        """Return what a decoder beside an encoder reads of each prompt of an invoke."""
        blueprint = self._blueprint
        if not blueprint.has_encoder_and_decoder:
            if invoke.decoder:
                kind = type(blueprint.model).__name__
                raise refused(
                    "graph", f"decoder=... needs a model with an encoder; {kind} has none"
                )
            return []
        if invoke.decoder and len(invoke.decoder) != len(invoke.prompts):
            raise refused("protocol", f"invoke {number} has not one decoder prompt for each prompt")
        start = blueprint.decoder_start
        found = []
        for index, prompt in enumerate(invoke.decoder or [""] * len(invoke.prompts)):
            place = f"decoder prompt {index} of invoke {number}"
            if not isinstance(prompt, str):
                ids = prompt
            elif start is not None:
                ids = [start, *self._tokenizer.continuation(prompt)]
            else:
                raise refused("graph", f"{place}: no token begins this decoder; give token ids")
            self._check_prompt(ids, place)
            found.append(ids)
        return found

    def _check_prompt(self, ids: list[int], place: str) -> None:
        most = self._blueprint.max_positions
        if not ids:
            raise refused("graph", f"{place} has no tokens")
        if len(ids) > most:
            raise refused("limit", f"{place} has {len(ids)} tokens; the model takes {most}")
        self._check_ids(ids, place)

    def _check_length(self, prompts: list[list[PromptTokens]], max_new_tokens: int) -> None:
        """Refuse a generation that the model's positions or the KV cache can't hold."""
        cache, most = self._cache, self._blueprint.max_positions
        if not cache.num_pages:
            raise refused("limit", f"generation needs {cache.missing}")
        pages = tokens = 0
        for number, invoke in enumerate(prompts):
            for index, prompt in enumerate(invoke):
                length = len(prompt.ids) + max_new_tokens
                if length > most:
                    raise refused(
                        "limit",
                        f"prompt {index} of invoke {number} has {len(prompt.ids)} tokens, which "
                        f"makes {length} with max_new_tokens={max_new_tokens}; "
                        f"the model takes {most}",
                    )
                pages += -(-length // cache.page_tokens)
                tokens += length
        if pages > cache.num_pages:
            raise refused(
                "limit",
                f"the prompts and max_new_tokens={max_new_tokens} for each make {tokens} tokens "
                f"({pages} pages of {cache.page_tokens}); the KV cache of this server holds "
                f"{cache.tokens} ({cache.num_pages} pages)",
            )

    def _check_ids(self, ids: list[int], place: str) -> None:
        if ids and max(ids) >= self._blueprint.vocab_size:
            bad, size = max(ids), self._blueprint.vocab_size
            raise refused("graph", f"{place} has token id {bad}; the model knows 0 to {size - 1}")

    def _check_price(self, price: Price) -> None:
        if price.saved_tensors > MAX_BUFFERS:
            raise refused(
                "limit",
                f"this request would save {price.saved_tensors} tensors over all of its steps; one "
                f"reply carries at most {MAX_BUFFERS}. Save at fewer steps, or stack what you save",
            )
        for nbytes, most, what in (
            (price.value_bytes, self._limits.value_bytes, "make values of"),
            (price.saved_bytes, self._limits.saved_bytes, "save"),
        ):
            if nbytes > most:
                raise refused(
                    "limit",
                    f"this request would {what} {nbytes} bytes; this server allows {most}. "
                    "Save or keep less of it (a slice, fewer layers), or send fewer prompts",
                )

    def _tokenize(self, text: str) -> TokenizeReply:
        ids = self._tokenizer.encode(text)
        return TokenizeReply(ids, self._tokenizer.pieces(ids), self._tokenizer.decode(ids))

    def _detokenize(self, ids: list[int]) -> TokenizeReply:
        self._check_ids(ids, "the list")
        return TokenizeReply(ids, self._tokenizer.pieces(ids), self._tokenizer.decode(ids))


def _lane(request: TraceRequest) -> Lane:
    if request.numerics == "solo":
        return "alone"
    return "gradient" if request.graph.differentiates else "shared"


_decoder = msgspec.msgpack.Decoder(Submission)
