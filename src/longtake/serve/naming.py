"""Methods by the names that are registered in this program: a client never names a file."""

from __future__ import annotations

from .. import policies, reuse
from ..errors import LongtakeError
from ..policies import KVPolicy
from ..reuse import ReusePolicy

_READ_FILES = {"replay"}  # reuse policies whose option is a path


def policy_named(spec: str) -> KVPolicy:
    """`name[:key=value,…]`. Raises LongtakeError for anything else, the path of a Python file included."""
    known = sorted(policies.available())
    _check(spec, known, "policy")
    return policies.parse(spec)


def reuse_named(spec: str | None) -> ReusePolicy | None:
    """The same for reuse policies; None: nothing is reused."""
    if spec is None:
        return None
    _check(spec, sorted(set(reuse.available()) - _READ_FILES), "reuse policy")
    return reuse.parse(spec)


def served_policies() -> dict[str, type[KVPolicy]]:
    return policies.available()


def _check(spec: str, known: list[str], kind: str) -> None:
    name = spec.partition(":")[0]
    if name not in known:
        raise LongtakeError(f"no {kind} {name[:80]!r} here; known: {', '.join(known)}")
