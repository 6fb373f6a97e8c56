"""Who may ask, and whose turn it takes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from aiohttp.test_utils import make_mocked_request

from ndif_actor.config import ConfigError
from ndif_actor.http.auth import Authenticator, Caller
from ndif_actor.http.faults import HttpFault


def key_file(folder: Path, *lines: str) -> Path:
    file = folder / "keys"
    file.write_text("\n".join(lines))
    return file


def line(name: str, key: str) -> str:
    return f"{name} {hashlib.sha256(key.encode()).hexdigest()}"


def caller(authenticator: Authenticator, **headers: str) -> Caller:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return authenticator.caller(make_mocked_request("GET", "/", headers=named))


def test_a_known_key_names_its_user(tmp_path: Path) -> None:
    file = key_file(tmp_path, "# keys", "", line("ann", "secret-a"), line("bob", "secret-b"))

    found = caller(Authenticator.from_file(file), Authorization="Bearer secret-b")

    assert found == Caller("key:bob", "key:bob")


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer wrong", "Basic secret-a", "secret-a"])
def test_anything_else_is_refused(tmp_path: Path, value: str) -> None:
    authenticator = Authenticator.from_file(key_file(tmp_path, line("ann", "secret-a")))

    with pytest.raises(HttpFault) as caught:
        caller(authenticator, Authorization=value)

    assert caught.value.status == 401


def test_a_session_header_does_not_change_who_a_key_belongs_to(tmp_path: Path) -> None:
    authenticator = Authenticator.from_file(key_file(tmp_path, line("ann", "secret-a")))

    found = caller(authenticator, Authorization="Bearer secret-a", X_Ndif_Session="other")

    assert found.user == "key:ann"


def test_without_keys_sessions_take_turns_and_share_ownership() -> None:
    first = caller(Authenticator(), X_Ndif_Session="s1")
    second = caller(Authenticator(), X_Ndif_Session="s2")

    assert first.owner == second.owner == "anonymous"
    assert first.user != second.user
    assert caller(Authenticator(), X_Ndif_Session="no spaces!").user.startswith("peer:")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["ann secret-in-the-clear"], r"keys:1: expected `name sha256`"),
        ([], "holds no API key"),
    ],
)
def test_a_bad_key_file_stops_the_server(tmp_path: Path, lines: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Authenticator.from_file(key_file(tmp_path, *lines))
