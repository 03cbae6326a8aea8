"""The interface: REST for what is done once, one WebSocket per viewer for what goes on."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.websockets import WebSocketDisconnect, WebSocketState

from .. import __version__
from ..errors import LongtakeError
from .access import Tokens, bearer
from .errors import Refused
from .guard import Guard
from .interface import Sessions, Watcher
from .metrics import CONTENT_TYPE
from .naming import served_policies
from .page import add_page
from .protocol import (
    ASK,
    HELLO,
    VERSION,
    Done,
    ErrorAnswer,
    Failure,
    Fork,
    ModelInfo,
    NewSession,
    PolicyInfo,
    Problem,
    SessionInfo,
    Steer,
)

log = logging.getLogger("longtake.serve")

_SWEEP = 60.0  # seconds
_REFUSALS = (400, 401, 403, 404, 409, 410, 413, 421, 422, 429, 503, 507)
_ANSWERS: dict[str, Any] = {"responses": {status: {"model": ErrorAnswer} for status in _REFUSALS}}
_CLOSE = {400: 4400, 401: 4401, 404: 4404, 426: 4426, 503: 4503}  # WebSocket codes


async def owner_of(request: Request) -> str:  # a coroutine: plain functions are sent through a thread of their own
    """Whose token a request carries. Raises Refused."""
    owner: str = request.app.state.tokens.owner(bearer(request.headers.get("authorization")))
    return owner


Owner = Annotated[str, Depends(owner_of)]


def build(service: Sessions, tokens: Tokens) -> FastAPI:
    """The application. It closes the service when it ends."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(_sweep(service))
        yield
        sweeper.cancel()
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="longtake", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        openapi_url="/v1/openapi.json",
    )  # fmt: skip
    app.state.tokens = tokens
    _errors(app, service)
    _sessions(app, service)
    _operations(app, service)
    _watching(app, service, tokens)
    add_page(app)
    app.add_middleware(Guard, settings=service.settings)
    return app


def _sessions(app: FastAPI, service: Sessions) -> None:
    @app.get("/v1/models", **_ANSWERS)
    async def models(owner: Owner) -> list[ModelInfo]:
        return service.models()

    @app.get("/v1/policies", **_ANSWERS)
    async def policies(owner: Owner) -> list[PolicyInfo]:
        """KV policies by name, with their options and defaults."""
        found = sorted(served_policies().items())
        return [PolicyInfo(name=name, about=_about(kind), options=_options(kind)) for name, kind in found]

    @app.post("/v1/sessions", status_code=201, **_ANSWERS)
    async def create(owner: Owner, request: NewSession) -> SessionInfo:
        """Begin a session. 503 says what would fit where this one does not."""
        return await service.create(owner, request)

    @app.get("/v1/sessions", **_ANSWERS)
    async def sessions(owner: Owner) -> list[SessionInfo]:
        return await service.infos(owner)

    @app.get("/v1/sessions/{name}", **_ANSWERS)
    async def session(owner: Owner, name: str) -> SessionInfo:
        return await service.info(owner, name)

    @app.delete("/v1/sessions/{name}", status_code=204, **_ANSWERS)
    async def delete(owner: Owner, name: str) -> None:
        await service.delete(owner, name)

    @app.post("/v1/sessions/{name}/steer", **_ANSWERS)
    async def steer(owner: Owner, name: str, request: Steer) -> dict[str, Any]:
        """Do something at the next chunk border; the answer comes when it is done. A session that has ended refuses
        with 409 what needs chunks to come: prompt, policy, resume, and the start of a recording."""
        return await service.steer(owner, name, request.action)

    @app.post("/v1/sessions/{name}/park", **_ANSWERS)
    async def park(owner: Owner, name: str) -> SessionInfo:
        """Send it to disk; whatever is asked of it next brings it back."""
        return await service.park(owner, name)

    @app.post("/v1/sessions/{name}/fork", status_code=201, **_ANSWERS)
    async def fork(owner: Owner, name: str, request: Fork) -> SessionInfo:
        """A new session that goes on from a snapshot, or from where this one stands, even at its end: for `chunks`
        more, by default for as many as this one had before it."""
        return await service.fork(owner, name, request)

    @app.delete("/v1/sessions/{name}/snapshots/{snapshot}", status_code=204, **_ANSWERS)
    async def delete_snapshot(owner: Owner, name: str, snapshot: str) -> None:
        await service.delete_snapshot(owner, name, snapshot)

    @app.get("/v1/sessions/{name}/recording", response_class=Response, **_ANSWERS)
    async def recording(owner: Owner, name: str) -> Response:
        """The recording so far, as an MP4 that plays."""
        size, parts = await service.recording(owner, name)
        headers = {"content-length": str(size), "content-disposition": 'attachment; filename="take.mp4"'}
        return StreamingResponse(parts, media_type="video/mp4", headers=headers)


def _operations(app: FastAPI, service: Sessions) -> None:
    @app.get("/healthz", include_in_schema=False)
    async def health() -> Response:
        return JSONResponse({"status": "ok"} if service.healthy else {"status": "a device's thread has ended"},
                            200 if service.healthy else 500)  # fmt: skip

    @app.get("/readyz", include_in_schema=False)
    async def ready() -> Response:
        up = service.healthy and not service.closing
        return JSONResponse({"status": "ready" if up else "not ready"}, 200 if up else 503)

    @app.get("/metrics", include_in_schema=False)
    async def metrics(owner: Owner) -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/protocol")
    async def protocol() -> dict[str, int]:
        return {"version": VERSION}


def _watching(app: FastAPI, service: Sessions, tokens: Tokens) -> None:
    @app.get("/v1/sessions/{name}/mjpeg", response_class=Response, **_ANSWERS)
    async def mjpeg(owner: Owner, name: str) -> Response:
        """The stream as JPEG pictures, for players that know nothing else."""
        take, viewer = await service.watch(owner, name, "jpeg")

        async def parts() -> AsyncIterator[bytes]:
            try:
                while (item := await viewer.next()) is not None:
                    if isinstance(item.payload, bytes):
                        head = f"--frame\r\ncontent-type: image/jpeg\r\ncontent-length: {len(item.payload)}\r\n\r\n"
                        yield head.encode() + item.payload + b"\r\n"
            finally:
                service.unwatch(take, viewer)

        return StreamingResponse(parts(), media_type="multipart/x-mixed-replace; boundary=frame")

    @app.websocket("/v1/sessions/{name}/watch")
    async def watch(socket: WebSocket, name: str) -> None:
        """Hello from the client; then welcome, the header, and fragments, with messages between them."""
        await socket.accept()
        try:
            hello = await asyncio.wait_for(_hello(socket), service.settings.hello_seconds)
            owner = tokens.owner(bearer(socket.headers.get("authorization")) or hello.token)
            take, viewer = await service.watch(owner, name, hello.format)
        except WebSocketDisconnect:
            return
        except TimeoutError:
            await _part(socket, Refused(400, "hello", "the first message is a hello, and it did not come"))
            return
        except LongtakeError as error:
            await _part(socket, error)
            return
        tasks = [asyncio.create_task(_send(socket, viewer)), asyncio.create_task(_obey(socket, viewer, service, name))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            service.unwatch(take, viewer)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await _close(socket, 1012 if service.closing else 1000)


async def _hello(socket: WebSocket) -> Any:
    """The client's first message. Raises Refused."""
    text = await _text(socket)
    try:
        version = json.loads(text).get("version")
    except (ValueError, AttributeError, RecursionError):
        version = None
    if isinstance(version, int) and version != VERSION:
        raise Refused(426, "version", f"version {version}: this server speaks version {VERSION}")
    try:
        return HELLO.validate_json(text)
    except ValidationError as error:
        raise Refused(400, "malformed", f"not a hello: {_words(error.errors(include_input=False))}") from None


async def _send(socket: WebSocket, viewer: Watcher) -> None:
    while (item := await viewer.next()) is not None:
        if isinstance(item.payload, str):
            await socket.send_text(item.payload)
        else:
            await socket.send_bytes(item.payload)


async def _obey(socket: WebSocket, viewer: Watcher, service: Sessions, name: str) -> None:
    """Do what a viewer asks, one thing at a time."""
    while True:
        number: int | None = None
        try:
            text = await _text(socket)
            try:
                ask = ASK.validate_json(text)
            except ValidationError as error:
                raise Refused(400, "malformed", f"not an action: {_words(error.errors(include_input=False))}") from None
            number = ask.id
            viewer.tell(Done(id=number, result=await service.steer(viewer.owner, name, ask.action)))
        except WebSocketDisconnect:
            return
        except LongtakeError as error:
            service.metrics.refused.labels(_problem(error).code).inc()
            viewer.tell(Failure(id=number, error=_problem(error)))


async def _text(socket: WebSocket) -> str:
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1005))
    if message.get("text") is None:
        raise Refused(400, "malformed", "messages to this server are JSON text")
    return message["text"]


async def _part(socket: WebSocket, error: LongtakeError) -> None:
    """Say why, and close."""
    with contextlib.suppress(RuntimeError, WebSocketDisconnect):
        await socket.send_text(Failure(error=_problem(error)).model_dump_json())
    await _close(socket, _CLOSE.get(getattr(error, "status", 400), 4400))


async def _close(socket: WebSocket, code: int) -> None:
    if socket.client_state is WebSocketState.CONNECTED and socket.application_state is WebSocketState.CONNECTED:
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            await socket.close(code)


def _errors(app: FastAPI, service: Sessions) -> None:
    """Every failure as `{"error": {"code", "message", …}}`, and nothing of the inside in it."""

    def answer(status: int, problem: Problem, retry: float | None = None) -> JSONResponse:
        service.metrics.refused.labels(problem.code).inc()
        headers = {} if retry is None else {"retry-after": str(max(1, round(retry)))}
        if status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(ErrorAnswer(error=problem).model_dump(exclude_none=True), status, headers=headers)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return answer(error.status, error.problem, error.retry)

    @app.exception_handler(LongtakeError)
    async def wrong(request: Request, error: LongtakeError) -> JSONResponse:
        return answer(422, _problem(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(422, Problem(code="invalid", message=_words(error.errors())))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, Problem(code="http", message=str(error.detail)))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        log.error("request failed", exc_info=error)
        return answer(500, Problem(code="internal", message="this is a defect of the server; its log says more"))


def _problem(error: LongtakeError) -> Problem:
    return error.problem if isinstance(error, Refused) else Problem(code="invalid", message=str(error))


def _words(errors: Any) -> str:
    """What a validator found, without what it was given."""
    listed = [f"{'.'.join(str(part) for part in e['loc'])[:120]}: {e['msg'][:200]}" for e in list(errors)[:5]]
    return "; ".join(listed)


def _about(kind: type) -> str:
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


def _options(kind: Any) -> dict[str, str]:
    return {f.name: str(f.default) for f in dataclasses.fields(kind) if f.init}


async def _sweep(service: Sessions) -> None:
    while True:
        await asyncio.sleep(_SWEEP)
        try:
            await asyncio.to_thread(service.sweep)
        except Exception:
            log.exception("sweep failed")
