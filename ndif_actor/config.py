"""The settings of a server: one flat frozen record, and where each value came from.

Flags win over environment variables (`NDIF_ACTOR_` + the name in capitals), those over a TOML
file, those over the defaults. A value that does not fit its type is an error that names it, and
so is a name nobody knows.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

PREFIX = "NDIF_ACTOR_"

#: Variables with our prefix that are no setting: the checkpoint cache, the per-run secret of the
#: links, and the address a Slurm job hands to its tasks.
OTHER_VARIABLES = frozenset({"NDIF_ACTOR_CACHE", "NDIF_ACTOR_SECRET", "NDIF_ACTOR_PARENT"})

Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
Bytes = Annotated[int, msgspec.Meta(ge=1)]


class ConfigError(ValueError):
    """A setting is unknown or has a value that it can't have."""


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that can be set, with units in the names.

    Attributes:
        model: a local folder, a hub id, or "demo".
        tp: tensor-parallel degree, which is the number of shards.
        max_pass_tokens: rows that one forward may carry in all.
        max_pass_bytes: memory that the values of one forward may take at their peak.
        max_request_bytes: length of one HTTP body.
        max_value_bytes: memory that the values of one request may take at their peak.
        max_saved_bytes: what one request may save.
        cache_bytes: memory of each device for the KV cache of generations; None for a share of
            what is free when the model is loaded.
        max_swapped_tokens: tokens of KV cache that may lie in each host's memory meanwhile.
        share_prefixes: whether users may profit from the KV cache of each other's prompts, which
            lets them find out by timing what others have sent.
        max_queued, max_queued_per_user: requests that may be here, unfinished.
        max_queued_bytes: what clients sent for all of these.
        result_ttl_s: how long a result can be fetched again.
        max_result_bytes: memory for kept results.
        max_held_bytes: memory on each device for the values that the sessions of one user keep on
            the server.
        max_held_bytes_in_all: the same for all users together.
        held_for_s: how long these values stay when their session is idle.
        drain_s: how long running requests may go on after SIGTERM.
        join_timeout_s: how long to wait for all shards to join.
        load_timeout_s: how long a shard may load.
        pass_timeout_s: how long one forward may take before its shard counts as stalled.
        group_timeout_s: how long a collective may wait for a peer.
    """

    model: str
    tp: Positive = 1
    device: Literal["auto", "cuda", "cpu"] = "auto"
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8000
    api_key_file: str | None = None
    address_file: str | None = None
    log_format: Literal["auto", "json", "console"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    max_pass_tokens: Positive = 4096
    max_pass_bytes: Bytes = 8 << 30
    max_request_bytes: Bytes = 256 << 20
    max_value_bytes: Bytes = 8 << 30
    max_saved_bytes: Bytes = 2 << 30
    cache_bytes: Bytes | None = None
    max_swapped_tokens: Annotated[int, msgspec.Meta(ge=0)] = 1 << 20
    share_prefixes: bool = False
    max_queued: Positive = 8192
    max_queued_per_user: Positive = 2048
    max_queued_bytes: Bytes = 2 << 30
    result_ttl_s: Seconds = 600.0
    max_result_bytes: Bytes = 4 << 30
    max_held_bytes: Bytes = 1 << 30
    max_held_bytes_in_all: Bytes = 8 << 30
    held_for_s: Seconds = 3600.0

    drain_s: Seconds = 30.0
    join_timeout_s: Seconds = 300.0
    load_timeout_s: Seconds = 1800.0
    pass_timeout_s: Seconds = 600.0
    group_timeout_s: Seconds = 60.0


Origin = Literal["flag", "environment", "file", "default"]


class Settings(msgspec.Struct, frozen=True):
    """A configuration, where each of its values came from, and what to warn about."""

    config: ServerConfig
    origins: dict[str, Origin]
    warnings: list[str] = []


def read_settings(
    flags: Mapping[str, Any],
    environment: Mapping[str, str],
    file: Path | None = None,
) -> Settings:
    """Merge flags, environment and file into one checked configuration.

    Args:
        flags: values given on the command line; None means not given.
        environment: usually `os.environ`.
        file: a TOML file with the same names, or None.

    Raises:
        ConfigError: an unknown name in the file or a flag, or a value of the wrong type or out of
            range. Unknown environment variables are only warned about: a cluster's own scripts
            may use the prefix too.
    """
    names = [field.name for field in msgspec.structs.fields(ServerConfig)]
    from_environment, warnings = _read_environment(environment, names)
    layers: list[tuple[Origin, dict[str, Any]]] = [
        ("file", _read_file(file)),
        ("environment", from_environment),
        ("flag", {name: value for name, value in flags.items() if value is not None}),
    ]
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = dict.fromkeys(names, "default")
    for origin, layer in layers:
        for name, value in layer.items():
            if name not in names:
                raise ConfigError(_unknown(name, names, origin))
            values[name], origins[name] = value, origin
    try:
        config = msgspec.convert(values, ServerConfig, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), values, origins)) from None
    return Settings(config, origins, warnings)


def _read_file(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"can't read {file}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from None


def _read_environment(
    environment: Mapping[str, str], names: list[str]
) -> tuple[dict[str, Any], list[str]]:
    found, warnings = {}, []
    for variable, value in environment.items():
        if not variable.startswith(PREFIX) or variable in OTHER_VARIABLES:
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name in names:
            found[name] = value
        else:
            known = [PREFIX + name.upper() for name in names]
            warnings.append(_unknown(variable, known, "environment"))
    return found, warnings


def _unknown(name: str, names: list[str], origin: Origin) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"unknown setting {name} ({origin}){hint}"


def _explain(problem: str, values: Mapping[str, Any], origins: Mapping[str, Origin]) -> str:
    """Add the value and its origin to msgspec's message, which ends in "- at `$.name`"."""
    name = problem.rpartition("$.")[2].rstrip("`")
    if name not in values:
        return problem
    return f"{name} = {values[name]!r} ({origins[name]}): {problem.partition(' - at ')[0]}"
