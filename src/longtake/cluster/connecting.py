"""Ray: one of our own on loopback, or a cluster that somebody started."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from .. import errors
from ..errors import LongtakeError

LOOPBACK = "127.0.0.1"
STORE_BYTES = 256 * 2**20  # of our own Ray's object store: what is on its way between processes
# Ray has no argument for it: at "0" a node takes the loopback address, and everything it starts listens there alone.
# Otherwise it replaces 127.0.0.1 by the machine's own address and listens on every interface.
_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@contextlib.contextmanager
def connected(address: str | None = None, cpus: int | None = None, store_bytes: int = STORE_BYTES) -> Iterator[Any]:
    """The `ray` module, connected until the end of the block.

    address: of a cluster, HOST:PORT or "auto"; None starts a Ray of our own for this process: on loopback, without
    dashboard, with `cpus` CPUs (default: the machine's) and an object store of `store_bytes`. A process that is
    connected already stays so, and keeps its connection afterwards.
    Raises LongtakeError if Ray is not installed, or there is no cluster at the address.
    """
    own = address is None
    before = signal.getsignal(signal.SIGTERM)
    with _on_loopback(own or str(address).rpartition(":")[0] in (LOOPBACK, "localhost")):
        ray = _imported()
        found = ray.is_initialized()
        told = None if found else _start(ray, address, cpus, store_bytes)
    try:
        if told is not None:
            _signals(_leave)  # in place of Ray's own handler, whose exit code is no shell's
        if own and told is not None and told.address_info["node_ip_address"] != LOOPBACK:
            raise LongtakeError(
                "Ray was imported before and would listen on other addresses than loopback: import it later, or start "
                "a cluster yourself and give its address"
            )
        yield ray
    finally:
        if not found:
            ray.shutdown()
            _signals(before)


def _leave(number: int, frame: Any) -> None:
    sys.exit(128 + number)


def _signals(handler: Any) -> None:
    """What SIGTERM does, where Python lets it be said."""
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGTERM, handler)


def slots(ray: Any, wanted: int | None, device: str | None, threads: int | None) -> tuple[int, dict[str, float]]:
    """How many workers, and what Ray reserves for each: a GPU where the cluster has some and `device` is not "cpu",
    else `threads` CPUs. Raises LongtakeError for more than the cluster has."""
    there = ray.cluster_resources()
    if device != "cpu" and there.get("GPU", 0) >= 1:
        share, most, what = {"num_gpus": 1.0, "num_cpus": 1.0}, int(there["GPU"]), "GPU"
    else:
        each = threads or 1
        share, most, what = {"num_cpus": float(each)}, int(there.get("CPU", 0)) // each, f"{each} CPU"
    count = wanted or most
    if not 1 <= count <= most:
        raise LongtakeError(f"{count} workers of {what} each: this Ray has room for {most}")
    return count, share


def _start(ray: Any, address: str | None, cpus: int | None, store_bytes: int) -> Any:
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {
            "include_dashboard": False, "num_cpus": cpus, "object_store_memory": store_bytes,
            "_node_ip_address": LOOPBACK,
            "_system_config": {"worker_niceness": 0},  # 15 by default, so that anything else comes first
        }  # fmt: skip
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        return ray.init(address=address or "local", **options)
    except Exception as error:  # ConnectionError, RuntimeError, ValueError, its own kinds
        raise LongtakeError(f"no Ray at {address or 'loopback'}: {first_line(error)}") from error


def _imported() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise LongtakeError(f"{error.name} is not installed: pip install 'longtake[cluster]'") from error
    return ray


@contextlib.contextmanager
def _on_loopback(wanted: bool) -> Iterator[None]:
    """Let Ray be imported and started for loopback alone."""
    before = os.environ.get(_CLUSTERS)
    if wanted:
        os.environ[_CLUSTERS] = "0"
    try:
        yield
    finally:
        if wanted and before is None:
            del os.environ[_CLUSTERS]
        elif wanted and before is not None:
            os.environ[_CLUSTERS] = before


def first_line(error: BaseException) -> str:
    """The first line of what Ray says; the rest are traces of its workers."""
    return " ".join(errors.first_line(error).split())
