"""A server as a whole: models onto devices, uvicorn around the application, an end that finishes what it began."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
import uvicorn

from ..hosts.base import Host
from .access import Tokens
from .admission import measure
from .app import build
from .interface import Sessions
from .metrics import Metrics
from .scheduler import Worker
from .service import Service
from .settings import Settings

_WS_MESSAGE = 1 << 16  # bytes of a message to the server
_GRACE = 30  # seconds for open connections to end
_SHARE = 0.25  # of a machine's memory that sessions may take where nothing was said; of a GPU's free memory:
_GPU_SHARE = 0.8


def service_of(
    hosts: Sequence[dict[str, Host]], settings: Settings, memory: int | None = None, threads: int | None = None
) -> Service:
    """Workers for devices, each with its own copies of the models by name, and the service over them. `memory` is what
    the sessions of each device may take, in bytes. Raises LongtakeError if the state folder cannot be used."""
    metrics = Metrics()
    workers = []
    for models in hosts:
        constants = {name: measure(host) for name, host in models.items()}
        budget = memory if memory is not None else _budget(next(iter(models.values())).device)
        workers.append(Worker(models, constants, budget, settings, metrics, threads))
    return Service(workers, settings, metrics)


class Server(uvicorn.Server):
    """Uvicorn, whose first act at a signal is to say goodbye to the viewers: it waits for their connections."""

    def __init__(self, service: Sessions, tokens: Tokens, host: str = "127.0.0.1", port: int = 8000) -> None:
        config = uvicorn.Config(
            build(service, tokens), host=host, port=port, log_config=None, access_log=False, lifespan="on",
            ws_max_size=_WS_MESSAGE, ws_per_message_deflate=False, ws_ping_interval=20, ws_ping_timeout=20,
            timeout_graceful_shutdown=_GRACE, server_header=False, proxy_headers=False,
        )  # fmt: skip
        super().__init__(config)
        self.service = service
        self._loop: Any = None

    async def startup(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port, once it has started."""
        name = self.servers[0].sockets[0].getsockname()
        return name[0], name[1]

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.stop()
        super().handle_exit(sig, frame)

    def stop(self) -> None:
        """Begin to end, from any thread."""
        self.service.closing = True
        if self._loop is not None:  # not here: a signal may have come while a viewer's lock is held
            self._loop.call_soon_threadsafe(self.service.drain)
        self.should_exit = True


class JsonLines(logging.Formatter):
    """A log record as one JSON object: time, level, message, and what was given with it (session, owner, …)."""

    _plain = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage(),
        }  # fmt: skip
        entry |= {key: value for key, value in vars(record).items() if key not in self._plain and key[0] != "_"}
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _budget(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _GPU_SHARE)
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _SHARE)
