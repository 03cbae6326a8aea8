"""What every command shares: exit codes, one line for an error, signals, texts into numbers and numbers into texts."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from ..errors import LongtakeError, NonFiniteError

if TYPE_CHECKING:
    from ..hosts.base import Host

FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its foreseeable failures said in one line on stderr and told by the exit code; a defect of
    ours keeps its traceback."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries underneath; ours are meant for the user
            warnings.filterwarnings("default", module=r"longtake(\.|$)")
            warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
            try:
                command(*args, **options)
            except LongtakeError as error:
                fail(str(error), WRONG_INPUT)
            except NonFiniteError as error:
                fail(str(error), FAILED)
            except KeyboardInterrupt:
                say("stopped")
                raise typer.Exit(INTERRUPTED) from None
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                fail(
                    "out of memory: use a smaller --size, a shorter window (--policy window:frames=…), "
                    "--residency scratch, or another --dtype or --device", WRONG_INPUT,
                )  # fmt: skip

    return run


def fail(message: str, code: int) -> None:
    """Say why on one line of stderr, and end with `code`."""
    say_error(message)
    raise typer.Exit(code)


def say_error(message: str) -> None:
    """What is wrong, on one line of stderr."""
    say(f"error: {' '.join(message.split())}")


def say(line: str) -> None:
    """A line on stderr: stdout is for the answer."""
    with contextlib.suppress(OSError):  # a terminal that was closed, a log reader that ended: no reason to lose a take
        typer.echo(line, err=True)


def say_written(paths: Iterable[Path]) -> None:
    """Where the files are."""
    say(f"written: {', '.join(str(path) for path in paths)}")


def answer(data: dict[str, Any], text: str, as_json: bool) -> None:
    """The command's result on stdout: one JSON object, or text."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False) if as_json else text)


def hush() -> None:
    """No progress bars and chatter of the libraries that read weights: they would break our own."""
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    for library in (diffusers, transformers):
        library.disable_progress_bar()
        library.set_verbosity(50)  # above ERROR: what goes wrong reaches the user as an exception


class StopAsked:
    """Within `with`, the first Ctrl-C, SIGTERM or SIGHUP is kept in `signal`; a Ctrl-C after it raises
    KeyboardInterrupt as usual.

    So a take can end at a chunk border, where its video and its snapshot agree, and a training between two steps.
    SIGTERM and SIGHUP never cut into a
    chunk, because service managers send the two together; SIGKILL, which no program can handle, does. Off the main
    thread, where Python allows no signal handlers, nothing changes.
    """

    def __init__(self, after: str = "chunk") -> None:
        self.signal: int | None = None
        self._after = after  # what is finished before the end
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """As shells have it: 128 and the signal."""
        return 128 + (self.signal or signal.SIGINT)

    def __enter__(self) -> StopAsked:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                # one that our parent had us ignore stays ignored: nohup works so
                if number is not None and (name == "SIGINT" or signal.getsignal(number) is not signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            if before is not None:  # set by C code, which cannot be put back from here
                signal.signal(number, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signal = number
        with contextlib.suppress(RuntimeError):  # the signal fell into a write to stderr, which cannot be entered twice
            say(f"stopping after this {self._after} (Ctrl-C again: at once)")


def check_seconds(seconds: float) -> None:
    """Raise LongtakeError for a length that no take can have."""
    if not (seconds > 0 and math.isfinite(seconds)):
        raise LongtakeError(f"{seconds:g} seconds: ask for a finite length above 0")


def check_choice(value: str | None, option: str, accepted: Iterable[str]) -> None:
    """Raise LongtakeError for a value that the option does not take."""
    known = list(accepted)
    if value is not None and value not in known:
        raise LongtakeError(f"{option} {value!r}: use one of {', '.join(known)}")


def check_device(device: str | None) -> None:
    """Raise LongtakeError for a device that torch does not know or that is not there."""
    if device is None:
        return
    import torch

    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise LongtakeError(f"device {device!r}: use cpu, cuda, cuda:N or mps") from None
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise LongtakeError(
            f"device {device}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here; "
            "use --device cpu, or a machine and a torch build with CUDA"
        )
    if wanted.type == "mps" and not torch.backends.mps.is_available():
        raise LongtakeError(f"device {device}: there is no Apple GPU here; use --device cpu")


def check_threads(threads: int | None) -> None:
    """Raise LongtakeError for a number of CPU threads that makes no sense here."""
    most = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= most:
        raise LongtakeError(f"{threads} threads: this machine runs from 1 to {most}")


@contextlib.contextmanager
def cpu_threads(threads: int | None, host: Host) -> Iterator[int]:
    """Within `with`, torch computes on `threads` CPU threads; by default on one for an embedded model and for others on
    as many as torch chose."""
    from ..evaluate.machine import threads_for

    with threads_for(host, threads) as running:
        yield running


def check_file(path: Path, what: str) -> None:
    """Raise LongtakeError before any work if a file cannot be made at `path`."""
    if path.is_dir():
        raise LongtakeError(f"{what} {path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise LongtakeError(f"{what} {path}: there is no folder {path.parent}; create it first")


def check_folder(out: Path) -> None:
    """Raise LongtakeError before any work if --out cannot be a folder."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise LongtakeError(f"{there} is not a folder: give --out a folder, it is made if it is not there")


def check_distinct(written: Mapping[str, Path | None], read: Mapping[str, Path | None]) -> None:
    """Raise LongtakeError if one file is to be written by two options, or written by one and read by another."""
    seen: dict[Path, str] = {}
    for name, path in (*read.items(), *written.items()):
        if path is None:
            continue
        place = path.resolve()
        if place in seen and name in written:
            raise LongtakeError(f"{seen[place]} and {name} name the same file, {path}: give each a file of its own")
        seen[place] = name


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """`WIDTHxHEIGHT` to (height, width) in pixels; None is the model's own."""
    if text is None:
        return None, None
    found = re.fullmatch(r"(\d+)\s*[x×X*]\s*(\d+)", text.strip())
    if not found:
        raise LongtakeError(f"size {text!r}: write WIDTHxHEIGHT in pixels, e.g. 832x480")
    return int(found[2]), int(found[1])


def parse_bytes(text: str) -> int:
    """`500MB`, `1.5GiB`, `1048576` to bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if not found or found[2] not in _UNITS or float(found[1]) <= 0:
        raise LongtakeError(f"{text!r} is no amount of memory: write e.g. 500MB, 1.5GB or 2GiB")
    return int(float(found[1]) * _UNITS[found[2]])


def bytes_text(count: float) -> str:
    """Bytes for people, in decimal units: 2.1 MB."""
    if count < 1000:
        return f"{count:.0f} B"
    power = min(4, int(math.log10(count) // 3))
    return f"{count / 1000**power:.3g} {' kMGT'[power]}B"


def peak_rss() -> int | None:
    """Most memory this process ever held, in bytes; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text
