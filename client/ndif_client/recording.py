"""The program of one experiment while it is being written: prompts, what is saved, and control."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ndif_client.arguments import encode
from ndif_client.errors import ClosedTraceError, GraphError, graph_error
from ndif_client.naming import complete_names, save_structure, unsaved_variables
from ndif_client.prompts import Messages, Prompt, as_invoke
from ndif_client.proxy import Proxy
from ndif_client.recorder import Recorder
from ndif_client.sources import capture, user_frame
from ndif_client.steps import Block
from ndif_client.wire.graph import MAX_INVOKES, MAX_LOGGED, Ref

if TYPE_CHECKING:
    from ndif_client.branches import Branch
    from ndif_client.caching import Cache, Modules
    from ndif_client.session import Session

#: What a function given to `session.trace` may be.
TraceFunction = Callable[[Any], Any]


#: What others call it, and what it is here.
_ELSEWHERE = {
    "stop": "a forward ends by itself after the last thing that is asked of it",
    "iter": "use `with gen.all():` or `with gen.steps[2:5]:`, which is no loop",
    "next": "use `with gen.steps[k]:`",
    "barrier": "values cross between invokes by themselves",
}


class Recording:
    """An experiment that is recorded, once.

    Values are saved by `value.save()`, or by giving them to an attribute: `trace.h = value`.
    """

    #: What it is called in messages, and what makes one.
    _noun: ClassVar[str] = "trace"
    _maker: ClassVar[str] = "session.trace"

    def __init__(self, session: Session, recorder: Recorder) -> None:
        self._session = session
        self._recorder = recorder
        self._stack = ExitStack()
        self._caches: list[tuple[Cache, int, Block, str]] = []
        self._opened = False
        #: what to say when it is to run
        self._saves_nothing: GraphError | None = None

    @property
    def seed(self) -> int:
        """The seed of its random numbers: given, or drawn for it."""
        return self._recorder.seed

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close(error)

    def invoke(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        decoder: Prompt | None = None,
    ) -> AbstractContextManager[None]:
        """Add prompts of their own; reads and writes inside of the block are theirs.

        All invokes of a trace run in one forward, and values cross freely between them.

        Args:
            prompt: a text, token ids, or a list of either (one batch).
            messages: a conversation in its place, or a list of them.
            decoder: what the decoder of an encoder-decoder model reads; see `Session.trace`.

        Raises:
            GraphError: that is no prompt.
            ClosedTraceError: nothing is recorded here.
        """
        recorder = self._recorder
        recorder.check_open()
        if not self._opened:
            raise graph_error(
                f"invoke(...) belongs inside of the {self._noun}'s own `with` block",
                ClosedTraceError,
            )
        if len(recorder.invokes) >= MAX_INVOKES:
            raise graph_error(f"a {self._noun} has at most {MAX_INVOKES} invokes")
        recorder.invokes.append(as_invoke(prompt, messages, decoder))
        return self._invoked(len(recorder.invokes) - 1)

    @contextmanager
    def _invoked(self, invoke: int) -> Iterator[None]:
        self._play_edits(invoke)
        with self._recorder.recording(invoke):
            yield

    def _play_edits(self, invoke: int) -> None:
        for edit in self._session._edits or ():
            edit.play(self._recorder, invoke, self._session.tree)

    def cache(
        self,
        modules: Modules | None = None,
        *,
        inputs: bool = False,
        outputs: bool = True,
        name: str | None = None,
    ) -> Cache:
        """Save what many modules return, as it is at the end of the block.

        Args:
            modules: modules, their paths, or patterns such as "model.layers.*.mlp", or several of
                them, also by the names that mean the same everywhere ("layers.*.mlp"); by default
                the residual stream after each layer.
            inputs: save what they are given, too (the first tensor of it).
            outputs: save what they return.
            name: what the result calls it; by default "cache", and "cache_2" if that is taken.

        Returns:
            A mapping from module paths to values, when the trace has run.

        Raises:
            GraphError: there are no such modules.
        """
        from ndif_client.caching import Cache

        self._recorder.check_open()
        invoke = self._recorder.here("cache()")
        cache = Cache(self._session.model, modules, inputs=inputs, outputs=outputs)
        if name is None:
            number = len(self._caches) + 1
            name = "cache" if number == 1 else f"cache_{number}"
        self._caches.append((cache, invoke, self._recorder.block, name))
        return cache

    # ------------------------------------------------------------ control

    def when(self, condition: Any) -> Branch:
        """Return a block whose code runs only if a value is not 0: `with trace.when(x > 3):`.

        Args:
            condition: a value of one element.

        Returns:
            The block; its `otherwise()` is the block for the other case.

        Raises:
            GraphError: the condition is no value of the trace.
        """
        from ndif_client.branches import branch

        return branch(condition, self._recorder)

    def log(self, *items: Any, to: Callable[[str], object] = print) -> None:
        """Print texts and values while it runs, as soon as the model has got there.

        `trace.log("norm", h.norm())` prints a line such as `norm 3.25`; of a large value the first
        and last numbers. A request logs at most 10,000 lines of 4,096 characters.

        Args:
            items: texts, numbers, and values of the trace.
            to: called with each line.

        Raises:
            GraphError: something is no value of this trace.
        """
        if not callable(to):
            raise graph_error(f"to={to!r:.80}: it is called with each line, as print is")
        if not items or len(items) > MAX_LOGGED:
            raise graph_error(f"a line has 1 to {MAX_LOGGED} texts and values")
        logged: list[Ref | str] = []
        for item in items:
            if isinstance(item, str | int | float):
                logged.append(str(item))
            else:
                argument = encode(item, self._recorder)
                if not isinstance(argument, Ref):
                    raise graph_error(f"a line has texts and values, not {type(item).__name__}")
                logged.append(argument)
        self._recorder.log(logged, to)

    def choose(self, condition: Any, then: Any, otherwise: Any) -> Proxy:
        """Return `then` if a condition holds, else `otherwise`, which has the same shape and dtype.

        Unlike `ops.where`, either may come from a `when` block, and only one of them is computed.
        """
        from ndif_client.branches import choose

        return choose(condition, then, otherwise, self._recorder)

    def while_loop(
        self,
        condition: Callable[..., Any],
        body: Callable[..., Any],
        state: Any,
        *,
        limit: int,
    ) -> Any:
        """Repeat while a condition holds, at most `limit` times.

        Args:
            condition: called with the state, returns a value of one element.
            body: called with the state, returns the next one, of equal shapes and dtypes.
            state: a value or number to begin with, or a tuple of them.
            limit: rounds at most, 1 to 256; after so many it ends, whatever the condition says.

        Returns:
            The last state.

        Raises:
            GraphError: the bound or a state can't be.
        """
        from ndif_client.branches import while_loop

        return while_loop(condition, body, state, limit, self._recorder)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        if hasattr(type(self), name):
            raise graph_error(
                f"a {self._noun} has its own {name!r}; give the value another name, or save it by "
                f".save({name!r})"
            )
        self._recorder.check_open()
        saved = save_structure(value, self._recorder, f"{self._noun}.{name}")
        self._recorder.name(name, saved, replace=True)
        self.__dict__[name] = value

    def __getattr__(self, name: str) -> Any:
        if name in ("all", "prefill", "steps"):
            raise AttributeError(f"no {name!r}: a trace has one step; use session.generate(...)")
        if name in _ELSEWHERE:
            raise AttributeError(f"no {name!r}: {_ELSEWHERE[name]}")
        raise AttributeError(f"nothing was saved as {name!r} on this {self._noun}")

    def _open(self) -> None:
        if self._opened:
            raise graph_error(
                f"a {self._noun} is recorded once; make another one", ClosedTraceError
            )
        self._opened = True
        self._recorder.open()
        if self._recorder.invokes:
            self._play_edits(0)
        self._stack.enter_context(self._recorder.recording(0 if self._recorder.invokes else None))

    def _close(self, error: BaseException | None) -> None:
        self._stack.close()
        try:
            if error is None:
                self._record_caches()
        except BaseException as refusal:
            self._recorder.failure = refusal
            raise
        finally:
            self._recorder.close(capture())
        if error is not None:
            self._recorder.failure = error
            return
        try:
            frame = user_frame()
            complete_names(self._recorder, frame)
            self._check(frame)
        except BaseException as refusal:
            self._recorder.failure = refusal
            raise

    def _record_caches(self) -> None:
        for cache, invoke, block, name in self._caches:
            cache.record(self._recorder, invoke, block, name)

    def _record(self, function: TraceFunction) -> None:
        error: BaseException | None = None
        self._open()
        try:
            returned = function(self._session.model)
            if returned is not None:
                self._save_returned(returned)
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._close(error)

    def _save_returned(self, returned: Any) -> None:
        saved = save_structure(returned, self._recorder, "what the function returns")
        if isinstance(saved, int):
            saved = {"value": saved}
        names = saved.items() if isinstance(saved, dict) else enumerate(saved)
        for name, layout in names:
            self._recorder.name(str(name), layout)

    def _check(self, frame: FrameType | None) -> None:
        recorder = self._recorder
        if not recorder.invokes and (recorder.is_empty or recorder.generates):
            raise graph_error(
                f"this {self._noun} has no prompt: {self._maker}(prompt), or invoke(prompt) inside"
            )
        self._check_saves(frame)

    def _check_saves(self, frame: FrameType | None) -> None:
        recorder = self._recorder
        if not recorder.names and not recorder.has_effects:
            held = " or ".join(map(repr, unsaved_variables(recorder, frame)))
            # Its shapes can be asked for all the same.
            self._saves_nothing = graph_error(
                f"this {self._noun} saves nothing, so it would compute for nobody: call .save() on "
                f"{held or 'a value'}, give it to an attribute of the {self._noun}, or return it "
                "from the function"
            )
