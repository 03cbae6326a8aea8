"""A viewer whose session runs in another process: what its queue there gives, piece by piece."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from ..serve.protocol import Bye, Message
from ..serve.stream import Item


class FarViewer:
    """Asks the worker for more when what came before has been sent: so the bounded queue is the worker's, and a slow
    viewer loses fragments there, as on one machine."""

    def __init__(self, agent: Any, number: int, owner: str, lost: type[BaseException]) -> None:
        self.owner, self.number = owner, number
        self._agent, self._lost_error = agent, lost
        self._items: deque[Item] = deque()
        self._ended = False
        self._news, self._empty = asyncio.Event(), asyncio.Event()
        self._empty.set()
        self._pump = asyncio.create_task(self._pull())

    def tell(self, message: Message) -> None:
        """A message for this viewer alone."""
        self._items.append(Item(message.model_dump_json()))
        self._news.set()

    async def next(self) -> Item | None:
        """The next item; None at the end."""
        while not self._items:
            if self._ended:
                return None
            self._empty.set()
            self._news.clear()
            await self._news.wait()
        return self._items.popleft()

    def close(self) -> None:
        self._pump.cancel()
        self._ended = True
        self._news.set()

    async def _pull(self) -> None:
        try:
            while True:
                await self._empty.wait()
                items = await self._agent.pull.remote(self.number)
                if items is None:
                    break
                self._empty.clear()
                self._items.extend(items)
                self._news.set()
        except self._lost_error:
            self.tell(Bye(reason="its worker died; the session comes back, watch it again"))
        self._ended = True
        self._news.set()
