"""Who may do what: tokens, their quotas, and the pages and names this server answers to."""

from __future__ import annotations

import hashlib
import hmac
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from ..errors import LongtakeError
from .errors import Refused
from .settings import Settings

LOCAL = "local"  # the owner of everything where no tokens are asked for
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SHORTEST = 16  # characters of a token


class Tokens:
    """API tokens by their owners' names; only digests are kept. Without any, everybody is one local user."""

    def __init__(self, tokens: Mapping[str, str] | None = None) -> None:
        self._digests = {name: _digest(token) for name, token in (tokens or {}).items()}

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """A file with `name token` on each line; `#` begins a comment. Raises LongtakeError."""
        tokens: dict[str, str] = {}
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise LongtakeError(f"token file {path} cannot be read: {error}") from error
        for number, line in enumerate(lines, start=1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            if len(words) != 2 or not _NAME.fullmatch(words[0]) or len(words[1]) < _SHORTEST or words[0] in tokens:
                raise LongtakeError(
                    f"{path}, line {number}: write `name token`, each name once, tokens of {_SHORTEST} or more "
                    "characters (e.g. of `openssl rand -hex 32`)"
                )
            tokens[words[0]] = words[1]
        if not tokens:
            raise LongtakeError(f"token file {path} holds no token: write `name token` on each line")
        return cls(tokens)

    @property
    def required(self) -> bool:
        return bool(self._digests)

    def owner(self, token: str | None) -> str:
        """Whose token it is. Raises Refused."""
        if not self._digests:
            return LOCAL
        given, found = _digest(token or ""), None
        for name, digest in self._digests.items():  # every one, so that time tells nothing
            if hmac.compare_digest(given, digest):
                found = name
        if found is None or token is None:
            raise Refused(401, "token", "give a token: `Authorization: Bearer …`, or in a WebSocket's first message")
        return found


class Rate:
    """At most so many events a minute for each owner."""

    def __init__(self, per_minute: int) -> None:
        self._most, self._lock = per_minute, threading.Lock()
        self._seen: dict[str, deque[float]] = {}

    def count(self, owner: str) -> None:
        """Count one. Raises Refused if there were too many."""
        now = time.monotonic()
        with self._lock:
            seen = self._seen.setdefault(owner, deque())
            while seen and now - seen[0] > 60:
                seen.popleft()
            if len(seen) >= self._most:
                raise Refused(429, "rate", f"{self._most} sessions a minute may be begun", retry=61 - (now - seen[0]))
            seen.append(now)


def check_place(headers: Iterable[tuple[bytes, bytes]], settings: Settings) -> None:
    """Refuse requests that another site's page sends through a visitor's browser: an Origin that is neither ours nor
    named in the settings, or a Host that somebody pointed at this machine. Raises Refused."""
    hosts = [value for key, value in headers if key.lower() == b"host"]
    origins = [value for key, value in headers if key.lower() == b"origin"]
    if len(hosts) != 1 or len(origins) > 1:
        raise Refused(400, "host", "send one Host header and at most one Origin")
    host = hosts[0].decode("latin1").lower()
    if settings.hosts and _without_port(host) not in settings.hosts:
        raise Refused(421, "host", "this server does not answer to that name; the operator adds names with --name")
    if origins:
        origin = origins[0].decode("latin1").lower()
        parts = urlsplit(origin)
        own = parts.scheme in ("http", "https") and parts.netloc == host
        if not own and origin not in settings.origins:
            raise Refused(403, "origin", "pages of other sites may not use this server")


def bearer(value: str | None) -> str | None:
    """The token of an Authorization header."""
    scheme, _, token = (value or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def _without_port(host: str) -> str:
    return re.sub(r":\d*$", "", host)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
