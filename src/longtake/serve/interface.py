"""What the application asks of whoever keeps the sessions: `Service` on one machine, a cluster's front on many."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol

from .metrics import Metrics
from .protocol import Fork, Message, ModelInfo, NewSession, SessionInfo
from .settings import Settings
from .stream import Item


class Watcher(Protocol):
    """A viewer's end of a stream."""

    owner: str

    def tell(self, message: Message) -> None: ...

    async def next(self) -> Item | None: ...


class Sessions(Protocol):
    """Every session, by its name and owner. All of it raises Refused, NoRoom or LongtakeError."""

    settings: Settings
    metrics: Metrics
    closing: bool

    def models(self) -> list[ModelInfo]: ...

    async def create(self, owner: str, request: NewSession) -> SessionInfo: ...

    async def info(self, owner: str, name: str) -> SessionInfo: ...

    async def infos(self, owner: str) -> list[SessionInfo]: ...

    async def steer(self, owner: str, name: str, action: Any) -> dict[str, Any]: ...

    async def delete(self, owner: str, name: str) -> None: ...

    async def delete_snapshot(self, owner: str, name: str, snapshot: str) -> None: ...

    async def park(self, owner: str, name: str) -> SessionInfo: ...

    async def fork(self, owner: str, name: str, request: Fork) -> SessionInfo: ...

    async def recording(self, owner: str, name: str) -> tuple[int, Iterator[bytes] | AsyncIterator[bytes]]:
        """Bytes of the recording so far, and they themselves."""

    async def watch(self, owner: str, name: str, kind: str) -> tuple[Any, Watcher]:
        """A viewer, and what `unwatch` wants beside it."""

    def unwatch(self, take: Any, viewer: Any) -> None: ...

    @property
    def healthy(self) -> bool: ...

    def drain(self) -> None:
        """Say goodbye to every viewer, and take nothing new."""

    def close(self) -> None:
        """Finish the chunks in flight, park every session. Waits."""

    def sweep(self) -> None:
        """Delete what nobody used for long. Waits."""
