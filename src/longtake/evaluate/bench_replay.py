"""An early and a late moment of one take, timed in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

from ..hosts.base import Host
from ..policies import KVPolicy
from ..session import Session


def replays(
    early: Path, late: Path, host: Host, pairs: int, seconds: Callable[[Session], float],
    progress: Callable[[int], None] = lambda done: None, policy: KVPolicy | None = None,
) -> tuple[list[float], list[float]]:  # fmt: skip
    """Seconds of one chunk after each of two snapshots, `pairs` times in turn; `seconds` makes a session's next chunk
    and says how long it took.

    Each replay is a fresh session with buffers of its own, so a lucky memory address favours neither side; its first
    chunk only warms them. `policy` is needed where no name is registered for it.
    """
    times: dict[Path, list[float]] = {early: [], late: []}
    for pair in range(pairs):
        for path in (early, late) if pair % 2 == 0 else (late, early):
            session = Session.restore(path, host, policy)
            next(session)
            times[path].append(seconds(session))
            del session
            gc.collect()
        progress(pair + 1)
    return times[early], times[late]
