"""Who is asking: API keys, kept as hashes only, and the identity that fair turns go by."""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path

import msgspec
from aiohttp import web

from ndif_actor.config import ConfigError
from ndif_actor.http.faults import HttpFault
from ndif_client.wire.messages import SESSION_HEADER

_SESSION = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_LINE = re.compile(r"(?P<name>[A-Za-z0-9_.@-]{1,64})\s+(?P<hash>[0-9a-f]{64})")


class Caller(msgspec.Struct, frozen=True):
    """Who sent a request.

    Attributes:
        owner: whose results it may fetch and cancel.
        user: whose turn it takes.
    """

    owner: str
    user: str


class Authenticator:
    """Check API keys against a file of hashes; without a file everyone is anonymous."""

    def __init__(self, hashes: dict[str, bytes] | None = None) -> None:
        self._hashes = hashes

    @classmethod
    def from_file(cls, file: Path | None) -> Authenticator:
        """Read lines of `name sha256-of-the-key`; empty lines and `#` comments are skipped.

        Raises:
            ConfigError: the file can't be read or has a line of another form.
        """
        if file is None:
            return cls()
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"can't read API keys from {file}: {error.strerror}") from None
        hashes = {}
        for number, line in enumerate(lines, start=1):
            text = line.partition("#")[0].strip()
            if not text:
                continue
            match = _LINE.fullmatch(text)
            if match is None:
                raise ConfigError(
                    f"{file}:{number}: expected `name sha256`, the hash as 64 hex digits "
                    "(printf %s KEY | sha256sum)"
                )
            hashes[match["name"]] = bytes.fromhex(match["hash"])
        if not hashes:
            raise ConfigError(f"{file} holds no API key, so nobody could use this server")
        return cls(hashes)

    @property
    def required(self) -> bool:
        """Whether a key is needed."""
        return self._hashes is not None

    def caller(self, request: web.Request) -> Caller:
        """Return who sent `request`.

        Raises:
            HttpFault: a key is needed, and there is none or a wrong one.
        """
        if self._hashes is None:
            return Caller("anonymous", _session(request) or f"peer:{request.remote}")
        name = self._name_of(_key(request))
        return Caller(f"key:{name}", f"key:{name}")

    def _name_of(self, key: str) -> str:
        assert self._hashes is not None
        offered = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for name, known in self._hashes.items():  # all of them, whichever matches
            if hmac.compare_digest(offered, known):
                found = name
        if found is None:
            raise HttpFault("auth", "unknown API key")
        return found


def _key(request: web.Request) -> str:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    raise HttpFault("auth", "this server needs an API key: send `Authorization: Bearer KEY`")


def _session(request: web.Request) -> str | None:
    name = request.headers.get(SESSION_HEADER, "")
    return f"session:{name}" if _SESSION.fullmatch(name) else None
