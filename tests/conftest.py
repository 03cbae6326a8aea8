"""Fixtures that several files of tests share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

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
