"""What an operator decides about a server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Limits and places. Bytes, seconds, pixels."""

    state: Path  # folder of the sessions' files, for the owner alone
    snapshot_every: int = 16  # chunks between two full snapshots
    idle_seconds: float = 60.0  # without a viewer, until a session is parked
    ttl_seconds: float = 7 * 86400.0  # a parked session or saved snapshot nobody used for so long is deleted
    lead_seconds: float = 1.0  # how far a take of pace "live" may be ahead of its player
    keyframe_seconds: float = 1.0
    max_sessions: int = 64
    sessions_per_token: int = 16
    creations_per_minute: int = 30  # per token
    disk_bytes_per_token: int = 20 * 10**9
    log_bytes: int = 2 * 10**9  # per session: older chunks leave the log
    record_bytes: int = 4 * 10**9  # per session
    saved_per_session: int = 32
    viewers_per_session: int = 64
    batch_most: int = 8  # sessions whose chunks are made together, of those that ask for it
    viewer_bytes: int = 16 * 10**6  # waiting for one viewer, above which fragments are dropped
    replay_chunks: int = 2000  # most that a change of policy replays
    max_body: int = 13_000_000
    max_image_pixels: int = 1 << 24
    max_pixels: int = 1920 * 1088
    hello_seconds: float = 5.0
    origins: tuple[str, ...] = ()  # other sites whose pages may use this server
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")  # names it answers to; (): any
