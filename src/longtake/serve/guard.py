"""What every request passes before anything reads it: where it comes from, how large it is."""

from __future__ import annotations

import json
from typing import Any

from .access import check_place
from .errors import Refused
from .settings import Settings

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", b"default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
     b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
]  # fmt: skip


class Guard:
    """ASGI middleware. Bodies are read here, up to the limit, so that nothing behind it holds more."""

    def __init__(self, app: Any, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        try:
            check_place(scope["headers"], self.settings)
            body = await self._body(scope, receive) if scope["type"] == "http" else None
        except Refused as error:
            await _refuse(scope, receive, send, error)
            return

        given = body is None

        async def replay() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in message["headers"]}
                extra = [(b"cache-control", b"no-store"), *_HEADERS]
                message["headers"] = [*message["headers"], *((k, v) for k, v in extra if k not in own)]
            await send(message)

        await self.app(scope, replay, sending)

    async def _body(self, scope: Any, receive: Any) -> bytes:
        """The whole body. Raises Refused if it is too large."""
        limit, parts, size = self.settings.max_body, [], 0
        told = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not told.isdigit() or int(told) > limit:
            raise Refused(413, "too_large", f"a request takes at most {limit} bytes")
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b""
            size += len(message.get("body", b""))
            if size > limit:
                raise Refused(413, "too_large", f"a request takes at most {limit} bytes")
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                return b"".join(parts)


async def _refuse(scope: Any, receive: Any, send: Any, error: Refused) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 4403})
        return
    body = json.dumps({"error": error.problem.model_dump(exclude_none=True)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
               (b"connection", b"close")]  # fmt: skip
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
