"""The web page: a handful of static files, each at a path of its own, under a policy that lets nothing else in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

_FOLDER = Path(__file__).parent / "page"
_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/link.js": ("link.js", "text/javascript"),
    "/player.js": ("player.js", "text/javascript"),
    "/views.js": ("views.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
# No inline script or style, nothing of other sites, and no way to turn text into markup (trusted types).
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)


def add_page(app: FastAPI) -> None:
    """Serve the page at `/`. It holds nothing of anybody's, so it needs no token; what it shows, it asks for with one.

    Routes rather than a mounted folder: a mount would also answer what is unknown, WebSockets with a failed assertion.
    """
    for path, (name, kind) in _FILES.items():
        app.add_api_route(path, _answer(name, kind), methods=["GET", "HEAD"], include_in_schema=False)


def _answer(name: str, kind: str) -> Callable[[], Awaitable[FileResponse]]:
    async def answer() -> FileResponse:
        return FileResponse(_FOLDER / name, media_type=kind, headers={"content-security-policy": _POLICY})

    return answer
