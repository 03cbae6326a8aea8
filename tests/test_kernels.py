"""Triton kernels: refused where they cannot run, and equal to their slow twins in Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from longtake import LongtakeError, Session
from longtake.kernels import check

from .tiny import text, tiny_wan


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: pip install longtake[kernels]")
def test_every_kernel_says_what_its_slow_twin_says():
    """All of `tests/interpreted`, in a process in which Triton interprets its kernels on the CPU."""
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", "tests/interpreted/kernels.py"],
        cwd=root, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout or "[100%]" in run.stdout


def refused(**options) -> str:
    with pytest.raises(LongtakeError) as error:
        Session(tiny_wan(), prompt_embeds=text(), decode=False, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_kernels_are_refused_where_they_cannot_run(monkeypatch):
    assert "use one of triton" in refused(kernels="cuda")
    monkeypatch.setattr("longtake.kernels.find_spec", lambda name: None)
    assert "pip install triton" in refused(kernels="triton")


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: pip install longtake[kernels]")
def test_kernels_are_refused_on_a_cpu():
    assert "needs a CUDA device, this model is on cpu" in refused(kernels="triton")


def test_without_kernels_triton_is_never_imported():
    code = (
        "import sys, longtake, longtake.kernels, longtake.history; "
        "assert not any(m.split('.')[0] == 'triton' for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
    assert check(None, torch.device("cpu")) is False
