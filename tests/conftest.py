"""Fixtures that several files of tests share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from longtake.hosts.base import Host
    from longtake.serve.client import Client
    from longtake.serve.server import Server

# Two processes test side by side: with a thread for every core each they would mostly wait for each other. Before torch
# is imported, and for the programs that tests start, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, without which pages are not tested."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path, "pages are tested in Chromium, which is not here: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def host() -> Host:
    """The embedded model that a server serves if it is told nothing else."""
    import longtake

    return longtake.load("tiny-shapes", device="cpu")


@pytest.fixture(scope="module")
def server(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Server]]:
    """One of `tests.serving`, which the tests of a file share."""
    from .serving import serving

    with serving(host, tmp_path_factory.mktemp("server") / "state") as running:
        yield running


@pytest.fixture
def client(server: tuple[Client, Server]) -> Iterator[Client]:
    """Its client; what a test leaves on it is deleted."""
    client, _ = server
    yield client
    for session in client.sessions():
        client.delete(session["id"])


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """The machine's ceilings, which every benchmark measures, are those of tiny sizes."""
    from longtake.evaluate import roofline

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "GEMM_SIZES", {"cpu": (32,)})
        patch.setattr(roofline, "COPY_BYTES", {"cpu": 1 << 16})
        yield


@pytest.fixture(scope="module")
def idle() -> Iterator[None]:
    """Benchmarks find the machine idle, whatever else runs on it."""
    from longtake.evaluate import provenance

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "others_busy", lambda: 0.0)
        yield
