"""A batch's file: one JSON object per line, each a take to be made."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import LongtakeError
from ..switching import SWITCHES

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_SIZE = re.compile(r"([1-9]\d{0,4})[x×]([1-9]\d{0,4})")
DEFAULT_MODEL, DEFAULT_SECONDS = "tiny-shapes", 5.0


@dataclass(frozen=True)
class Job:
    """A take, as a line asks for it. `id` names its result; without one the name follows from all the rest."""

    prompt: str
    seed: int = 0
    model: str = DEFAULT_MODEL  # an embedded model, a folder in diffusers format, or a Hub id
    policy: str | None = None  # NAME[:key=value,…]; default: the window the model was made for
    reuse: str = "none"
    seconds: float | None = None  # of video; rounded up to whole chunks
    chunks: int | None = None  # instead of seconds
    size: str | None = None  # WIDTHxHEIGHT in pixels
    steps: int | None = None
    guidance: float | None = None
    negative: str | None = None
    image: str | None = None  # a picture file: the first frame
    switch: tuple[tuple[float, str], ...] = ()  # (second, prompt): another prompt from there on
    switch_mode: str | None = None
    id: str | None = None

    @property
    def digest(self) -> str:
        """The same for the same take, whatever its id and its place in the file."""
        told = {key: value for key, value in asdict(self).items() if key != "id" and value not in (None, ())}
        return hashlib.sha256(json.dumps(told, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    @property
    def name(self) -> str:
        """Of the folder with the result."""
        return self.id or self.digest[:20]

    @property
    def height_width(self) -> tuple[int | None, int | None]:
        found = None if self.size is None else _SIZE.fullmatch(self.size)
        return (int(found[2]), int(found[1])) if found else (None, None)

    @classmethod
    def of(cls, told: Any, defaults: Mapping[str, Any]) -> Job:
        """A line's object, what it leaves out taken from `defaults`. Raises LongtakeError for anything that no model
        could make; what depends on the model shows when the take begins."""
        if not isinstance(told, dict):
            raise LongtakeError('a line is one JSON object, e.g. {"prompt": "a red ball", "seed": 1}')
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(told) - known):
            raise LongtakeError(f"unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
        given = {key: value for key, value in told.items() if value is not None}
        lengths = {"seconds", "chunks"}
        if lengths <= set(given):
            raise LongtakeError("seconds and chunks: give one of them")
        base = {k: v for k, v in defaults.items() if v is not None and not (k in lengths and lengths & set(given))}
        values = base | given
        if not lengths & set(values):
            values["seconds"] = DEFAULT_SECONDS
        _check_types(values)
        if "switch" in values:
            values["switch"] = _switches(values["switch"])
        job = cls(**values)
        _check(job)
        return replace(job, seconds=None if job.seconds is None else float(job.seconds))


@dataclass(frozen=True)
class Line:
    """A line of the file, from 1: a job, or what is wrong with it."""

    number: int
    job: Job | None = None
    problem: str | None = None


def read_lines(path: Path, defaults: Mapping[str, Any]) -> list[Line]:
    """Every line that is not blank. Raises LongtakeError if the file cannot be read, or has none."""
    try:
        texts = path.read_bytes().split(b"\n")
    except OSError as error:
        raise LongtakeError(
            f"{path} cannot be read: {error.strerror}; give a file with a JSON object per line"
        ) from None
    found: list[Line] = []
    ids: dict[str, tuple[int, str]] = {}
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            job = Job.of(_json(text), defaults)
            first, digest = ids.setdefault(job.name, (number, job.digest))
            if digest != job.digest:
                raise LongtakeError(f"id {job.name!r} is taken by line {first}, which asks for another take")
        except LongtakeError as error:
            found.append(Line(number, problem=str(error)))
        else:
            found.append(Line(number, job))
    if not found:
        raise LongtakeError(f'{path} has no lines: write a JSON object per line, e.g. {{"prompt": "a red ball"}}')
    return found


def _json(text: bytes) -> Any:
    try:
        return json.loads(text.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise LongtakeError(f"not JSON: {error}") from None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


_KINDS: dict[str, tuple[type, ...]] = {
    "prompt": (str,), "seed": (int,), "model": (str,), "policy": (str,), "reuse": (str,), "seconds": (int, float),
    "chunks": (int,), "size": (str,), "steps": (int,), "guidance": (int, float), "negative": (str,), "image": (str,),
    "switch": (list, tuple), "switch_mode": (str,), "id": (str,),
}  # fmt: skip
_WORDS = {str: "text", int: "a whole number", float: "a number", list: "a list"}


def _check_types(values: Mapping[str, Any]) -> None:
    if not isinstance(values.get("prompt"), str) or not values["prompt"].strip():
        raise LongtakeError('a line needs a prompt: {"prompt": "a red ball bouncing"}')
    for key, value in values.items():
        kinds = _KINDS[key]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise LongtakeError(f"{key} {str(value)[:80]!r}: give {_WORDS[list if list in kinds else kinds[-1]]}")


def _switches(pairs: Any) -> tuple[tuple[float, str], ...]:
    found = []
    for pair in pairs:
        match pair:
            case [int() | float() as at, str() as text] if 0 <= at < math.inf and text.strip():
                found.append((float(at), text))
            case _:
                raise LongtakeError(f'switch {str(pair)[:80]!r}: give [second, prompt], e.g. [[2.5, "… at night"]]')
    return tuple(sorted(found, key=lambda switch: switch[0]))


def _check(job: Job) -> None:
    from ..policies import parse
    from ..reuse import parse as parse_reuse

    if job.id is not None and not _ID.fullmatch(job.id):
        raise LongtakeError(
            f"id {job.id[:80]!r}: use up to 100 letters, digits, '.', '_' and '-', the first no '.' or '-'"
        )
    if not 0 <= job.seed < 2**63:
        raise LongtakeError(f"seed {job.seed}: use 0 to 2^63 - 1")
    if job.size is not None and not _SIZE.fullmatch(job.size):
        raise LongtakeError(f"size {job.size[:80]!r}: write WIDTHxHEIGHT in pixels, e.g. 832x480")
    if (job.chunks is not None and job.chunks < 1) or (job.steps is not None and job.steps < 1):
        raise LongtakeError("chunks and steps are at least 1")
    if job.seconds is not None and not 0 < job.seconds < math.inf:
        raise LongtakeError(f"{job.seconds} seconds: ask for a finite length above 0")
    if job.guidance is not None and not math.isfinite(job.guidance):
        raise LongtakeError(f"guidance {job.guidance}: give a finite number; 1 is no guidance")
    if job.switch_mode is not None and job.switch_mode not in SWITCHES:
        raise LongtakeError(f"switch_mode {job.switch_mode!r}: use one of {', '.join(SWITCHES)}")
    if job.policy is not None:
        parse(job.policy)
    parse_reuse(job.reuse)
    if job.image is not None and not Path(job.image).is_file():
        raise LongtakeError(f"image {job.image}: there is no such file")
