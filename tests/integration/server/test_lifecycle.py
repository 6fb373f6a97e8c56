"""How servers start, lose shards, recover, drain and end: always with real processes."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from ndif_actor.exits import ExitCode
from ndif_client.wire.messages import Queued, Running
from tests.conftest import MakeModel
from tests.integration.server.harness import (
    Refused,
    Server,
    gone,
    running,
    save_layer,
    slow,
    trace,
    wire,
)

MODEL = "llama-float32"


async def test_a_killed_shard_fails_its_forward_and_the_replica_comes_back(
    model_folder: MakeModel, tmp_path: Path
) -> None:
    nodes, buffers = slow(60)
    with running(model_folder("llama"), tmp_path / "log", "--tp", "2") as server:
        async with wire(server) as client:
            before = server.shards()
            assert len(before) == 2
            struck, queued = trace(MODEL, nodes), trace(MODEL, save_layer(1))
            first = asyncio.create_task(client.run(struck, buffers=buffers))
            await asyncio.sleep(0.5)
            second = asyncio.create_task(client.run(queued))
            await asyncio.sleep(0.2)

            before[1].send_signal(signal.SIGKILL)
            fault = (await asyncio.wait_for(first, 5)).failed(struck).fault

            assert fault.kind == "unavailable"
            assert "shard 1" in fault.message
            assert "restarts" in fault.message
            status, ready = await client.get_json("/ready")
            assert status == 503
            assert ready["checks"]["replica"] != "ok"
            with pytest.raises(Refused) as caught:
                await client.run(trace(MODEL, save_layer(1)))
            assert caught.value.status == 503
            assert "Retry-After" in caught.value.headers

            assert (await second).value(queued, "h").shape[-1] == 48
            assert gone(before)
            await client.until_ready()
            assert len(server.shards()) == 2


async def test_a_stalled_shard_counts_as_lost(model_folder: MakeModel, tmp_path: Path) -> None:
    limits = {"NDIF_ACTOR_PASS_TIMEOUT_S": "1.5"}
    with running(model_folder("llama"), tmp_path / "log", **limits) as server:
        async with wire(server) as client:
            (shard,) = server.shards()
            shard.suspend()
            request = trace(MODEL, save_layer(0))

            fault = (await client.run(request)).failed(request).fault

            assert fault.kind == "unavailable"
            assert "took longer than" in fault.message
            await client.until_ready()
            again = trace(MODEL, save_layer(0))
            assert (await client.run(again)).done(again)


async def test_sigterm_lets_running_requests_finish_and_takes_no_new_ones(
    model_folder: MakeModel, tmp_path: Path
) -> None:
    nodes, buffers = slow(40)
    address = tmp_path / "address"
    options = ("--address-file", str(address))
    with running(model_folder("llama"), tmp_path / "log", *options) as server:
        async with wire(server) as client:
            assert address.read_text().strip() == server.url
            shards = server.shards()
            request = trace(MODEL, nodes)
            async with client.post(request, buffers=buffers) as events:
                kinds = [(await anext(events))[0], (await anext(events))[0]]
                assert [type(kind) for kind in kinds] == [Queued, Running]
                server.signal(signal.SIGTERM)
                await asyncio.sleep(0.2)
                assert (await client.get_json("/health"))[0] == 200
                assert (await client.get_json("/ready"))[0] == 503
                with pytest.raises(Refused, match="draining") as caught:
                    await client.run(trace(MODEL, save_layer(0)))
                assert caught.value.status == 503

                assert type((await anext(events))[0]).__name__ == "Done"

        assert server.wait(10) == ExitCode.OK
        assert gone(shards)
        assert not address.exists()


async def test_a_second_signal_ends_the_drain(model_folder: MakeModel, tmp_path: Path) -> None:
    nodes, buffers = slow(400)
    with running(model_folder("llama"), tmp_path / "log") as server:
        shards = server.shards()
        async with (
            wire(server) as client,
            client.post(trace(MODEL, nodes), buffers=buffers) as events,
        ):
            await anext(events)
            server.signal(signal.SIGINT)
            await asyncio.sleep(0.3)
            assert server.process.poll() is None
            server.signal(signal.SIGINT)
            assert await asyncio.to_thread(server.wait, 15) == ExitCode.INTERRUPTED
        assert gone(shards)


def test_shards_do_not_outlive_a_killed_server(model_folder: MakeModel, tmp_path: Path) -> None:
    options = ("--tp", "2")
    with running(model_folder("llama"), tmp_path / "log", *options) as server:
        shards = server.shards()
        server.process.kill()
        server.wait()

        assert gone(shards, timeout_s=3)


def test_a_server_ends_when_its_stdin_does(model_folder: MakeModel, tmp_path: Path) -> None:
    with running(model_folder("llama"), tmp_path / "log", "--exit-with-stdin") as server:
        assert server.process.stdin is not None
        server.process.stdin.close()

        assert server.wait(15) == ExitCode.OK


async def test_an_unpackable_model_serves_one_request_at_a_time_and_says_so(
    model_folder: MakeModel, tmp_path: Path
) -> None:
    with running(model_folder("mamba"), tmp_path / "log") as server:
        async with wire(server) as client:
            _, tree = await client.get_json("/v1/models/mamba-float32")
            assert tree["packed"] is False
            assert tree["unpackable"]
            nodes = save_layer(0)[:0]
            requests = [trace("mamba-float32", nodes, "abc") for _ in range(2)]

            outcome = await client.run(*requests)

            statistics = [outcome.done(request).statistics for request in requests]
            assert [each.groups for each in statistics] == [1, 1]
            assert statistics[0].forward != statistics[1].forward
            assert statistics[0].numerics == "solo"


async def test_api_keys_guard_traces_and_separate_their_owners(
    model_folder: MakeModel, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    names = ("ann", "bob")
    keys.write_text("".join(f"{n} {hashlib.sha256(n.encode()).hexdigest()}\n" for n in names))
    options = ("--api-key-file", str(keys))
    with running(model_folder("llama"), tmp_path / "log", *options) as server:
        async with wire(server) as client:
            assert (await client.get_json("/ready"))[0] == 200
            assert (await client.get_json("/v1/models"))[0] == 401
            request = trace(MODEL, save_layer(0))
            with pytest.raises(Refused) as caught:
                await client.run(request)
            assert caught.value.status == 401

            outcome = await client.run(request, Authorization="Bearer ann")

            assert outcome.done(request)
            target = f"{server.url}/v1/traces/{request.id}"
            for key, status in (("bob", 404), ("ann", 200)):
                headers = {"Authorization": f"Bearer {key}"}
                async with client.http.get(target, headers=headers) as reply:
                    assert reply.status == status
        assert "ann" not in server.log.read_text().replace("announce", "")


# ---------------------------------------------------------------- shards that others start


def _shard(address: str, secret: Path, rank: int, port: int, log: Path) -> Server:
    arguments = ["shard", "--join", address, "--secret-file", str(secret)]
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return Server(arguments, log, **environment)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def test_shards_that_others_start_join_and_are_told_to_go_when_one_dies(
    model_folder: MakeModel, tmp_path: Path
) -> None:
    secret, address = tmp_path / "secret", f"tcp://127.0.0.1:{_free_port()}"
    model = str(model_folder("llama"))
    options = ("--shard-address", address, "--secret-file", str(secret))
    coordinator = Server(
        ["coordinator", model, "--tp", "2", "--port", "0", *options], tmp_path / "coordinator"
    )
    shards: list[Server] = []

    def start_shards() -> list[Server]:
        port = _free_port()
        new = [_shard(address, secret, r, port, tmp_path / f"s{len(shards)}{r}") for r in (0, 1)]
        shards.extend(new)
        return new

    try:
        while not secret.exists():
            await asyncio.sleep(0.05)
        assert secret.stat().st_mode & 0o777 == 0o600
        first, second = start_shards()
        coordinator.wait_until_ready()
        async with wire(coordinator) as client:
            request = trace(MODEL, save_layer(1))
            assert (await client.run(request)).done(request)

            second.process.kill()
            assert await asyncio.to_thread(first.wait, 5) == ExitCode.REPLICA_LOST
            status, ready = await client.get_json("/ready")
            assert status == 503
            assert ready["checks"]["replica"] == "waiting for shards 0, 1 of 2 to join"

            new = start_shards()
            await client.until_ready()
            request = trace(MODEL, save_layer(1))
            assert (await client.run(request)).done(request)

        coordinator.signal(signal.SIGTERM)
        assert coordinator.wait() == ExitCode.OK
        assert [shard.wait(5) for shard in new] == [ExitCode.OK, ExitCode.OK]
    finally:
        for server in (coordinator, *shards):
            server.stop()


def test_a_shard_that_does_not_know_the_secret_is_refused(
    model_folder: MakeModel, tmp_path: Path
) -> None:
    address = f"tcp://127.0.0.1:{_free_port()}"
    model = str(model_folder("llama"))
    good, bad = tmp_path / "good", tmp_path / "bad"
    bad.write_text("wrong\n")
    bad.chmod(0o600)
    options = ("--shard-address", address, "--secret-file", str(good))
    coordinator = Server(["coordinator", model, "--port", "0", *options], tmp_path / "log")
    shard = _shard(address, bad, 0, 1, tmp_path / "shard")
    try:
        assert shard.wait(20) == ExitCode.LAUNCH
        assert "does not know this run's secret" in shard.log.read_text()
        assert coordinator.process.poll() is None
    finally:
        shard.stop()
        coordinator.stop()


# ---------------------------------------------------------------- refusals to start


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["serve", "{llama}", "--tp", "3"], ExitCode.MODEL, "3"),
        (["serve", "{tmp}"], ExitCode.MODEL, "config.json"),
        (["serve", "{llama}", "--port", "{taken}"], ExitCode.LAUNCH, "can't listen on 127.0.0.1"),
        (["serve", "{llama}", "--dtype", "int3"], ExitCode.USAGE, "dtype = 'int3' (flag)"),
        (["shard", "--join", "nowhere"], ExitCode.LAUNCH, "no rank"),
    ],
)
def test_what_cannot_be_started_ends_with_a_reason_and_a_status(
    model_folder: MakeModel,
    tmp_path: Path,
    arguments: list[str],
    status: ExitCode,
    words: str,
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        places = {
            "llama": str(model_folder("llama")),
            "tmp": str(tmp_path),
            "taken": str(taken.getsockname()[1]),
        }
        server = Server([part.format(**places) for part in arguments], tmp_path / "log")
        try:
            assert server.wait(60) == status, server.log.read_text()
        finally:
            server.stop()
    last = server.log.read_text().splitlines()[-1]
    assert last.startswith("ndif-actor: ")
    assert words in last


def test_help_is_instant_and_needs_no_torch() -> None:
    began = time.monotonic()
    command = ["python", "-X", "importtime", "-m", "ndif_actor.cli", "serve", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)

    assert "--max-pass-tokens" in shown.stdout
    assert "torch" not in shown.stderr
    assert time.monotonic() - began < 5


def test_nothing_of_these_tests_is_left() -> None:
    mine = [
        process
        for process in psutil.process_iter(["cmdline", "ppid"])
        if "ndif_actor.cli" in " ".join(process.info["cmdline"] or []) and process.info["ppid"] == 1
    ]

    assert mine == []
