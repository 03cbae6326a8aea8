"""`longtake serve`: takes that people watch and steer over the network."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from ..errors import LongtakeError
from . import options, shell

if TYPE_CHECKING:
    from ..hosts.base import Host
    from ..serve.interface import Sessions

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    model: Annotated[
        list[str] | None,
        Option(
            "--model", "-m", metavar="[NAME=]MODEL",
            help="A model to serve, as for `longtake generate`; clients know it by NAME. Repeatable.",
            show_default=options.DEFAULT_MODEL,
        ),
    ] = None,
    host: Annotated[str, Option(help="Address to listen on; others than loopback need --tokens.")] = "127.0.0.1",
    port: Annotated[int, Option(help="Port; 0 picks a free one.")] = 8000,
    state: Annotated[
        Path, Option(metavar="DIR", help="Where sessions are kept; they outlive the server.")
    ] = Path("longtake-sessions"),
    memory: Annotated[
        str | None,
        Option(help="Bytes that the sessions of a device may take, e.g. 8GB.",
               show_default="a quarter of the machine's, or 80 % of what a GPU has free"),
    ] = None,
    tokens: Annotated[
        Path | None, Option(metavar="FILE", help="`name token` on each line: who may use the server.")
    ] = None,
    origin: Annotated[
        list[str] | None, Option(metavar="URL", help="Another site whose pages may use this server. Repeatable.")
    ] = None,
    name: Annotated[
        list[str] | None, Option(metavar="HOST", help="Another name this server answers to. Repeatable.")
    ] = None,
    device: Annotated[
        list[str] | None, Option(help="A device: cpu, cuda:0, …; each gets a copy of the models. Repeatable.")
    ] = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    snapshot_every: Annotated[int, Option(metavar="N", help="Chunks between full snapshots; the log fills in.")] = 16,
    idle: Annotated[float, Option(metavar="SECONDS", help="Unwatched for so long, a session goes to disk.")] = 60,
    ttl: Annotated[float, Option(metavar="HOURS", help="Unused for so long, a session is deleted.")] = 168,
    sessions_per_token: Annotated[int, Option(metavar="N", help="Sessions of one token.")] = 16,
    disk_per_token: Annotated[str, Option(metavar="BYTES", help="Disk space of one token.")] = "20GB",
    ray: Annotated[
        bool, Option("--ray", help="Workers on a Ray of its own, on loopback, which ends with the server.")
    ] = False,
    ray_address: options.RayAddress = None,
    workers: options.Workers = None,
) -> None:  # fmt: skip
    """Serve takes that people watch and steer: a page, REST and WebSockets. See `docs` for the protocol.

    Ctrl-C or SIGTERM finishes the chunk in flight, writes every session to disk and ends; the next server with the same
    --state goes on with them, also after a SIGKILL.
    """
    shell.check_threads(threads)
    shell.check_choice(dtype, "--dtype", options.DTYPES)
    if not 0 <= port < 65536 or snapshot_every < 1 or idle < 0 or ttl <= 0 or sessions_per_token < 1:
        raise LongtakeError("--port is 0 to 65535, --snapshot-every and --sessions-per-token at least 1, --ttl above 0")
    _check_free(host, port)
    budget = None if memory is None else shell.parse_bytes(memory)
    disk = shell.parse_bytes(disk_per_token)
    try:
        from ..serve.access import Tokens
        from ..serve.server import JsonLines, Server, service_of
        from ..serve.settings import Settings
    except ModuleNotFoundError as error:
        raise LongtakeError(f"{error.name} is not installed: pip install 'longtake[serve]'") from error
    known = Tokens() if tokens is None else Tokens.read(tokens)
    if host not in _LOOPBACK and not known.required:
        raise LongtakeError(f"--host {host}: others can reach it, so say who may use it with --tokens FILE")
    names = (*_LOOPBACK[:2], "[::1]", host, *(name or ())) if not known.required or name else ()

    on_ray = ray or ray_address is not None
    if workers is not None and not on_ray:
        raise LongtakeError("--workers is for Ray: add --ray, or --ray-address; here each --device is one")
    if on_ray and device and len(device) > 1:
        raise LongtakeError("--device is given more than once: on Ray each worker has one device; use --workers")

    shell.hush()
    sources = dict(_named(text) for text in model or [options.DEFAULT_MODEL])
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    settings = Settings(
        state=state.resolve(), snapshot_every=snapshot_every, idle_seconds=idle, ttl_seconds=ttl * 3600,
        sessions_per_token=sessions_per_token, disk_bytes_per_token=disk,
        origins=tuple(site.rstrip("/").lower() for site in origin or ()), hosts=tuple(n.lower() for n in names),
    )  # fmt: skip
    with contextlib.ExitStack() as around:
        service: Sessions
        if on_ray:
            from ..cluster.connecting import connected, slots
            from ..cluster.front import Front

            connection = around.enter_context(connected(ray_address))
            place = device[0] if device else None
            count, share = slots(connection, workers, place, threads)
            shell.say(f"starting {count} worker{'s' if count > 1 else ''} on Ray")
            there = {name: str(Path(text).resolve()) if Path(text).is_dir() else text for name, text in sources.items()}
            service = Front(connection, count, share, there, settings, budget, place, dtype, threads)
        else:
            places: list[str | None] = [*device] if device else [None]
            hosts = [_load(sources, each, dtype) for each in places]
            used = around.enter_context(shell.cpu_threads(threads, next(iter(hosts[0].values()))))
            service = service_of(hosts, settings, budget, used)
        server = Server(service, known, host, port)
        shell.say(f"serving {', '.join(sources)} at http://{host}:{port or '(a free port, see the log)'}")
        server.run()


def _named(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    return (name, source) if equals else (Path(text).name, text)


def _load(sources: dict[str, str], device: str | None, dtype: str | None) -> dict[str, Host]:
    from .generate import check_host, load_host

    shell.check_device(device)
    found = {}
    for name, source in sources.items():
        shell.say(f"loading {source}")
        found[name] = load_host(source, device, dtype, None, "keep" if device == "cpu" else "offload")
        check_host(found[name], True, None, None)
    return found


def _check_free(host: str, port: int) -> None:
    """Raises LongtakeError, before a model is loaded, if nothing can listen there."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise LongtakeError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}): is another server there? "
            "Use another --port"
        ) from error
