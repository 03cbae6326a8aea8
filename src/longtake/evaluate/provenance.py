"""Where a figure comes from: machine, software, commit; and whether somebody else was using the machine."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..errors import LongtakeError

BUSY_LIMIT = 0.15  # of all cores, used by other processes
BUSY_SECONDS = 2.0  # how long is looked before a run


@dataclass(frozen=True)
class CpuTimes:
    """Seconds of CPU time since boot, summed over cores: spent by everybody, by this process, and in all."""

    busy: float
    own: float
    total: float

    def others_until(self, later: CpuTimes) -> float:
        """Share of all cores that other processes used between two readings, 0 … 1."""
        total = later.total - self.total
        if total <= 0:
            return 0.0
        return min(1.0, max(0.0, (later.busy - self.busy) - (later.own - self.own)) / total)


def cpu_times() -> CpuTimes | None:
    """A reading of /proc/stat; None on systems without it."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        # user nice system idle iowait irq softirq steal; guest time is contained in user
        ticks = [int(x) for x in first[1:9]]
        tick = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
    own = os.times()
    total, idle = sum(ticks) / tick, (ticks[3] + ticks[4]) / tick
    return CpuTimes(total - idle, own.user + own.system + own.children_user + own.children_system, total)


def others_busy(seconds: float = BUSY_SECONDS) -> float | None:
    """Share of all cores that other processes use, watched for `seconds`; None where it cannot be told."""
    before = cpu_times()
    if before is None:
        return None
    time.sleep(seconds)
    after = cpu_times()
    return None if after is None else before.others_until(after)


def refuse_if_busy(busy: float | None, force: bool, limit: float = BUSY_LIMIT) -> None:
    """Raise LongtakeError on a machine that others are using, unless `force`."""
    if busy is not None and busy > limit and not force:
        raise LongtakeError(
            f"other processes use {busy:.0%} of this machine, a benchmark accepts {limit:.0%}: "
            "stop them, or give --force (the figures are then marked as forced)"
        )


def provenance(device: torch.device) -> dict[str, Any]:
    """Date, machine, software and commit of a run, as JSON values; what cannot be told is null."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu_model(), "cores": os.cpu_count(), "usable_cores": _usable_cores(),
            "memory_bytes": _memory_bytes(), "os": platform.platform(),
            "simd": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        },
        "versions": {
            "python": platform.python_version(), **_versions("torch", "diffusers", "transformers", "longtake"),
        },
        "git": _git(),
    }  # fmt: skip


def write_atomically(path: Path, data: bytes) -> None:
    """The whole file or none. Raises LongtakeError if it cannot be written."""
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden.write_bytes(data)
        os.replace(hidden, path)
    except OSError as error:
        raise LongtakeError(f"cannot write {path}: {error.strerror or error}; give another folder") from error
    finally:
        with contextlib.suppress(OSError):
            hidden.unlink(missing_ok=True)


def write_report(folder: Path, stem: str, document: str, pictures: Mapping[str, bytes]) -> list[Path]:
    """`stem`.json and the pictures in `folder`, each whole or not at all: `stem`-NAME.png, or `stem`.png for the name
    "". Raises LongtakeError if one cannot be written."""
    files = {folder / f"{stem}.json": (document + "\n").encode()}
    files |= {folder / f"{stem}{'-' * bool(name)}{name}.png": data for name, data in pictures.items()}
    for path, data in files.items():
        write_atomically(path, data)
    return list(files)


def read_json(path: Path) -> Any:
    """Raises LongtakeError if the file is not there or not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LongtakeError(f"{path} is not a readable benchmark file: {error}") from error


def _cpu_model() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _versions(*names: str) -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _git() -> dict[str, Any] | None:
    """Commit of the checkout this package lies in, and whether the package differs from it; None outside a checkout."""
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # a copy inside somebody else's repository is not this commit
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return None
