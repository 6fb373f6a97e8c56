"""The `ndif-actor` command: reads its arguments, starts the parts, ends with a named status.

Everything heavy is imported by the command that needs it, so that `--help` is instant.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

try:
    import typer
except ModuleNotFoundError:
    raise SystemExit("the server is not installed: pip install 'ndif-actor[server]'") from None

from ndif_actor.exits import ExitCode

if TYPE_CHECKING:
    from ndif_actor.config import ServerConfig, Settings

app = typer.Typer(
    name="ndif-actor",
    help="Many researchers share one loaded language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="A local folder, a hub id, or `demo`.")]
Tp = Annotated[int | None, typer.Option(help="Tensor-parallel degree: the number of shards.")]
Device = Annotated[str | None, typer.Option(help="auto, cuda or cpu.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float64, float32, bfloat16 or float16.")]
Host = Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1].")]
Port = Annotated[int | None, typer.Option(help="Port to listen on, 0 for any free one [8000].")]
Tokens = Annotated[int | None, typer.Option(help="Rows that one forward may carry in all.")]
CacheBytes = Annotated[int | None, typer.Option(help="KV cache of each device, in bytes.")]
SharePrefixes = Annotated[
    bool | None,
    typer.Option(help="Let users profit from the KV cache of each other's prompts."),
]
KeyFile = Annotated[str | None, typer.Option(help="API keys, as lines of `name sha256`.")]
AddressFile = Annotated[str | None, typer.Option(help="File to write the URL to when ready.")]
LogFormat = Annotated[str | None, typer.Option(help="auto, json or console.")]
LogLevel = Annotated[str | None, typer.Option(help="debug, info, warning or error.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file of settings.")]
Stdin = Annotated[bool, typer.Option("--exit-with-stdin", help="Stop when stdin is closed.")]
ShardAddress = Annotated[str, typer.Option(help="Where shards join: tcp://HOST:PORT.")]
JoinAddress = Annotated[str, typer.Option("--join", help="The coordinator's --shard-address.")]
SecretFile = Annotated[
    Path | None, typer.Option(help="The run's secret; made by the coordinator if absent.")
]

T = TypeVar("T")


@app.command()
def serve(
    context: typer.Context,
    model: Model,
    tp: Tp = None,
    device: Device = None,
    dtype: Dtype = None,
    host: Host = None,
    port: Port = None,
    max_pass_tokens: Tokens = None,
    cache_bytes: CacheBytes = None,
    share_prefixes: SharePrefixes = None,
    api_key_file: KeyFile = None,
    address_file: AddressFile = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
    config: ConfigFile = None,
    exit_with_stdin: Stdin = False,
) -> None:
    """Serve MODEL: start the coordinator and its shards on this machine."""
    settings = _settings(context)
    if exit_with_stdin:
        threading.Thread(target=_stop_at_end_of_stdin, daemon=True).start()

    from ndif_actor.serving import serve_here

    _run_server(settings.config, serve_here)


@app.command()
def coordinator(
    context: typer.Context,
    model: Model,
    shard_address: ShardAddress,
    secret_file: SecretFile = None,
    tp: Tp = None,
    device: Device = None,
    dtype: Dtype = None,
    host: Host = None,
    port: Port = None,
    max_pass_tokens: Tokens = None,
    cache_bytes: CacheBytes = None,
    share_prefixes: SharePrefixes = None,
    api_key_file: KeyFile = None,
    address_file: AddressFile = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
    config: ConfigFile = None,
) -> None:
    """Serve MODEL with shards that srun, torchrun or a person starts."""
    settings = _settings(context)

    from ndif_actor.serving import serve_joining

    def start(config: ServerConfig, folder: Path) -> Coroutine[Any, Any, None]:
        return serve_joining(config, folder, shard_address, secret_file)

    _run_server(settings.config, start)


@app.command()
def shard(
    join: JoinAddress,
    secret_file: SecretFile = None,
    device: Device = None,
    log_format: Annotated[str, typer.Option(help="auto, json or console.")] = "auto",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Join a coordinator as one shard; the launcher's environment says which."""
    from ndif_actor.errors import ServerError
    from ndif_actor.serving import run_one_shard

    try:
        code = _run(run_one_shard(join, secret_file, device, log_format, log_level))
    except (ServerError, ValueError) as error:
        code = _complain(error)
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    # The device thread may be stuck in a collective: nothing may wait for it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@app.command()
def fetch(model: Model) -> None:
    """Download MODEL with a progress bar, so that it is there when it is to be served."""
    from ndif_actor.engine.checkpoint import resolve
    from ndif_actor.errors import ModelError

    try:
        print(resolve(model))
    except ModelError as error:
        raise typer.Exit(_complain(error)) from None


@app.command()
def version() -> None:
    """Print the version and what it speaks."""
    from ndif_actor.http.status import version as describe

    found = describe()
    print(f"ndif-actor {found.version} (protocol {found.protocol}, Python {found.python})")


@app.command("config")
def show_config(
    model: Annotated[str | None, typer.Argument(help="As for `serve`.")] = None,
    config: ConfigFile = None,
) -> None:
    """Print the effective settings and where each comes from."""
    settings = _read_settings({"model": model or "MODEL"}, config)
    for warning in settings.warnings:
        print(f"ndif-actor: {warning}", file=sys.stderr)
    for name, origin in settings.origins.items():
        if name != "model" or model is not None:
            print(f"{name} = {getattr(settings.config, name)!r}  ({origin})")


def main() -> None:
    """Run the command."""
    app()


# ---------------------------------------------------------------- between the lines


def _settings(context: typer.Context) -> Settings:
    """Read the settings of a server from the flags of its command, and set the logs up."""
    flags = dict(context.params)
    file = flags.pop("config")
    for name in ("exit_with_stdin", "shard_address", "secret_file"):
        flags.pop(name, None)
    settings = _read_settings(flags, file)

    import structlog

    from ndif_actor.logs import configure_logs

    configure_logs(settings.config.log_format, settings.config.log_level, actor="coordinator")
    for warning in settings.warnings:
        structlog.get_logger(__name__).warning(warning)
    return settings


def _read_settings(flags: dict[str, Any], file: Path | None) -> Settings:
    from ndif_actor.config import ConfigError, read_settings

    try:
        return read_settings(flags, os.environ, file)
    except ConfigError as error:
        raise typer.Exit(_complain(error)) from None


def _run_server(config: ServerConfig, start: Any) -> NoReturn:
    """Fetch the model, run the server, and turn its errors into a line and a status."""
    import asyncio

    from ndif_actor.engine.checkpoint import resolve
    from ndif_actor.errors import ServerError

    try:
        folder = resolve(config.model)
        _run(start(config, folder))
    except (ServerError, ValueError, OSError) as error:
        code = _complain(error)
    except (KeyboardInterrupt, asyncio.CancelledError):
        code = ExitCode.INTERRUPTED
    else:
        code = ExitCode.OK
    sys.stdout.flush()
    sys.stderr.flush()
    # torch's threads have nothing to say any more, and an import may still be going on in one.
    os._exit(code)


def _run(work: Coroutine[Any, Any, T]) -> T:
    import uvloop

    return uvloop.run(work)


def _complain(error: Exception) -> ExitCode:
    from ndif_actor.config import ConfigError
    from ndif_actor.errors import LaunchError, ModelError

    print(f"ndif-actor: {error}", file=sys.stderr)
    codes = {ConfigError: ExitCode.USAGE, ModelError: ExitCode.MODEL, LaunchError: ExitCode.LAUNCH}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), ExitCode.ERROR)


def _stop_at_end_of_stdin() -> None:
    """Send ourselves a SIGTERM when whoever holds the other end of stdin is gone."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
