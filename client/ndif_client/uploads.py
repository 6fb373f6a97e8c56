"""Arrays and files of tensors on their way to the server, where they are held, and back."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ndif_client.errors import TensorFileError, graph_error
from ndif_client.held import Handle, name_of
from ndif_client.proxy import Proxy
from ndif_client.tensor_files import Tensor, reading, write
from ndif_client.trace import Trace
from ndif_client.wire.messages import HeldSpec, SavedTensor
from ndif_client.wire.tensors import TensorSpec, check_buffer, export_array

if TYPE_CHECKING:
    from ndif_client.session import Session

#: A tensor and the name that it is to have, if any.
Wanted = tuple[str | None, Tensor]

#: Bytes of tensors that one request brings along, if it brings several, and how many these are.
_REQUEST_BYTES = 32 << 20
_REQUEST_TENSORS = 512


async def upload(session: Session, array: Any, name: str | None) -> Handle:
    """Have the server hold a copy of an array or tensor; see `Session.upload`."""
    try:
        tensor = Tensor(*export_array(array))
    except TypeError as error:
        raise graph_error(f"this can't be uploaded: {error}") from None
    (handle,) = await _upload_all(session, [(name, tensor)])
    return handle


async def upload_file(
    session: Session, path: str | os.PathLike[str], prefix: str | None
) -> dict[str, Handle]:
    """Have the server hold the tensors of a file; see `Session.upload_file`."""
    with reading(path) as tensors:
        wanted: list[Wanted] = [
            (None if prefix is None else prefix + name, tensor) for name, tensor in tensors.items()
        ]
        handles = await _upload_all(session, wanted)
        return dict(zip(tensors, handles, strict=True))


async def fetch(session: Session, names: Iterable[str]) -> Trace:
    """Return a trace that has saved these held values, in order."""
    trace = Trace(session)
    with trace:
        for number, name in enumerate(names):
            session.held(name).save(str(number))
    await trace
    return trace


async def download(
    session: Session, handles: Mapping[str, Handle | str], path: str | os.PathLike[str]
) -> None:
    """Write held values to a file; see `Session.download`."""
    if not handles:
        raise graph_error("there is nothing to download")
    trace = await fetch(session, map(name_of, handles.values()))
    tensors: dict[str, Tensor] = {}
    for number, name in enumerate(handles):
        saved, buffers = trace.result._raw(str(number))
        if not isinstance(saved, SavedTensor):
            raise TensorFileError(f"{name!r} is a tuple of tensors, and a file has only tensors")
        spec = saved.tensor
        tensors[name] = Tensor(spec.dtype, spec.shape, check_buffer(spec, buffers))
    await asyncio.to_thread(write, path, tensors)


async def _upload_all(session: Session, wanted: Sequence[Wanted]) -> list[Handle]:
    """Upload tensors under these names, or none; what is held already is not sent."""
    holder = session._holder
    digests = [await asyncio.to_thread(_digest, tensor) for _, tensor in wanted]
    held: dict[str, HeldSpec] = {}
    if any(holder.uploaded(digest) for digest in digests):
        held = (await holder.values()).held
    handles: dict[int, Handle] = {}
    sources: dict[int, str | None] = {}
    for number, ((name, tensor), digest) in enumerate(zip(wanted, digests, strict=True)):
        known = holder.uploaded(digest)
        if known is not None and held.get(known) != _spec(tensor):
            known = None
        if known is not None and name == known:
            handles[number] = holder.handle(known)
        else:
            sources[number] = known
    for group in _groups(sources, wanted):
        trace = Trace(session)
        with trace:
            for number in group:
                name, tensor = wanted[number]
                handles[number] = _record(session, trace, name, tensor, sources[number])
        await trace
    for number, digest in enumerate(digests):
        holder.note_upload(digest, handles[number].name, _spec(wanted[number][1]))
    return [handles[number] for number in range(len(wanted))]


def _groups(sources: Mapping[int, str | None], wanted: Sequence[Wanted]) -> Iterator[list[int]]:
    """Divide what is to be kept among requests of bounded size, a tensor each at least."""
    group: list[int] = []
    nbytes = 0
    for number, source in sources.items():
        own = wanted[number][1].data.nbytes if source is None else 0
        if group and (nbytes + own > _REQUEST_BYTES or len(group) >= _REQUEST_TENSORS):
            yield group
            group, nbytes = [], 0
        group.append(number)
        nbytes += own
    if group:
        yield group


def _record(
    session: Session, trace: Trace, name: str | None, tensor: Tensor, source: str | None
) -> Handle:
    """Record that a tensor is kept; its bytes are sent unless it is held under another name."""
    recorder = trace._recorder
    if source is not None:
        return Proxy(recorder, recorder.held(session.held(source))).keep(name)
    constant = recorder.constant_bytes(tensor.dtype, tensor.shape, bytes(tensor.data))
    return Proxy(recorder, constant).keep(name)


def _digest(tensor: Tensor) -> str:
    digest = hashlib.blake2b(f"{tensor.dtype}{list(tensor.shape)}".encode(), digest_size=32)
    digest.update(tensor.data)
    return digest.hexdigest()


def _spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tensor.dtype, tensor.shape)  # type: ignore[arg-type]
