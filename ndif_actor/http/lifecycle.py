"""A server from its first to its last moment: listen, load, say ready, drain, leave nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import tempfile
from pathlib import Path
from typing import Any

import structlog
from aiohttp import web

from ndif_actor.config import ServerConfig
from ndif_actor.coordinator.coordinator import Coordinator
from ndif_actor.http.application import bind, make_application, url_of

_log = structlog.get_logger(__name__)


async def run_server(config: ServerConfig, coordinator: Coordinator, folder: Path) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the drain at once.

    Args:
        config: settings.
        coordinator: not yet running.
        folder: the model's files.

    Raises:
        ModelError: the model can't be served as asked.
        LaunchError: the address can't be had, or the shards don't start.
        asyncio.CancelledError: a second signal came.
    """
    stop = _stop_on_signals()
    listener = bind(config.host, config.port)
    runner = web.AppRunner(
        make_application(config, coordinator),
        access_log=None,
        handle_signals=False,
        shutdown_timeout=config.drain_s,
    )
    await runner.setup()
    await web.SockSite(runner, listener).start()
    _log.info("listening", url=url_of(listener), model=coordinator.model_id)
    serving = asyncio.ensure_future(
        asyncio.gather(coordinator.run(folder), _announce(config, coordinator, listener))
    )
    try:
        await _first_of(serving, stop)
        _log.info("draining", timeout_s=config.drain_s)
        await coordinator.drain(config.drain_s)
        await runner.cleanup()
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await coordinator.close()
        _forget_address(config)
    _log.info("stopped")


def _stop_on_signals() -> asyncio.Event:
    """Return what the first SIGTERM or SIGINT sets; the second cancels the current task."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    task = asyncio.current_task()
    assert task is not None

    def on_signal(name: str) -> None:
        _log.info("signal", name=name, second=stop.is_set())
        if stop.is_set():
            task.cancel()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number.name)
    return stop


async def _first_of(serving: asyncio.Future[Any], stop: asyncio.Event) -> None:
    """Wait for `stop`; if `serving` ends before, raise what ended it."""
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
    if serving.done():
        serving.result()


async def _announce(
    config: ServerConfig, coordinator: Coordinator, listener: socket.socket
) -> None:
    """Print the ready line, once, and write the address file."""
    await coordinator.ready.wait()
    summary, url = coordinator.summary(), url_of(listener)
    if config.address_file is not None:
        _write_atomically(Path(config.address_file), url + "\n")
    print(
        f"ndif-actor ready: {url} model={summary.id} tp={summary.tensor_parallel} "
        f"device={coordinator.device} dtype={summary.dtype}",
        flush=True,
    )


def _forget_address(config: ServerConfig) -> None:
    if config.address_file is not None:
        Path(config.address_file).unlink(missing_ok=True)


def _write_atomically(file: Path, text: str) -> None:
    """Write a file that readers see whole or not at all."""
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    with os.fdopen(descriptor, "w", encoding="utf-8") as target:
        target.write(text)
    os.chmod(name, 0o644)
    os.replace(name, file)
