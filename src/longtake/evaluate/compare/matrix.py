"""What a comparison is made of, from a YAML file or from options. Of free takes:

models: [tiny-shapes]
policies: [full, window, "window:frames=9,sink=0"]
budgets: [9, 15]                 # latent frames of full K/V that every policy is fitted to; none: as they are
reuse: [none, "flowcache:slow"]
prompts: [a red ball bouncing]   # or the name of a text file, one prompt a line
seeds: 3                         # 0, 1, 2; or a list
seconds: [5, 20]                 # and / or `chunks`
size: 832x480
steps: 4
guidance: 1
negative: blurred

With `protocols`, of the procedural world:

protocols: [A, B]
models: [tiny-wan, tiny-wan-long]
policies: [window, packforcing]  # none: every policy that has a name
budgets: [9, 12, 21]
compressors: [own, low-resolution]
seeds: 32                        # scenes
frames: 120
free: 504
gaps: [1, 2, 4]
against: window
as_given: false
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ...errors import LongtakeError

T = TypeVar("T")


@dataclass(frozen=True)
class Matrix:
    """Free takes: every policy × reuse × prompt × seed × length. Sizes None: the model's own; `policies` empty: the
    window that the model was made for."""

    models: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    budgets: tuple[int, ...] = ()  # latent frames
    reuse: tuple[str, ...] = ("none",)
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    seconds: tuple[float, ...] = ()
    chunks: tuple[int, ...] = ()
    height: int | None = None  # pixels
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    negative: str = ""

    def __post_init__(self) -> None:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise LongtakeError("free takes need prompts, none of them empty: give --prompt, or prompts in the matrix")
        if not (self.seconds or self.chunks):
            raise LongtakeError("free takes need a length: give --seconds or --chunks, or one of them in the matrix")
        if not self.seeds or not self.reuse:
            raise LongtakeError("seeds and reuse: give at least one of each, as in seeds: 1 and reuse: [none]")


def read_matrix(path: Path) -> Matrix | dict[str, Any]:
    """The matrix of a YAML file; or, if it has protocols, the options of `longtake compare` that it stands for, by
    name. Raises LongtakeError, in one line, for a file that cannot be read, a key that is not known, and a value of
    another kind."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LongtakeError(f"matrix {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or "it is not YAML"
        raise LongtakeError(f"{path}{where}: {problem}; see `longtake compare --help`") from error
    if not isinstance(content, dict):
        raise LongtakeError(f"{path}: a matrix has keys and values ({', '.join(_KEYS)})")
    world = "protocols" in content
    keys = _WORLD if world else _KEYS
    if unknown := [str(key) for key in content if key not in keys]:
        raise LongtakeError(f"{path}: no key {unknown[0]!r}; a matrix {_OF[world]} has {', '.join(keys)}")
    found: dict[str, Any] = {}
    for key, value in content.items():
        try:
            found |= keys[key](key, value, path)
        except LongtakeError as error:
            raise LongtakeError(f"{path}: {error}") from error
    if world:
        return {
            _OPTIONS.get(key, key): list(value) if isinstance(value, tuple) else value for key, value in found.items()
        }
    try:
        return Matrix(**found)
    except LongtakeError as error:
        raise LongtakeError(f"{path}: {error}") from error


def parse_prompts(path: Path) -> tuple[str, ...]:
    """Prompts of a text file, one a line; empty lines count for nothing."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LongtakeError(f"prompts {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    found = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise LongtakeError(f"prompts {path}: there is no prompt in it; write one a line")
    return found


def _many(kind: type[T], what: str, least: float | None = None) -> Callable[[str, Any, Path], dict[str, Any]]:
    """One value or a list of them, all of a kind."""

    def read(key: str, value: Any, path: Path) -> dict[str, Any]:
        values = value if isinstance(value, list) else [value]
        for each in values:
            right = type(each) is kind or (kind is float and type(each) is int)
            if not right or (least is not None and not least <= each < float("inf")):
                raise LongtakeError(f"{key}: {each!r}; give {what}, or a list of such")
        return {key: tuple(dict.fromkeys(values))}

    return read


def _one(kind: type[T], what: str, least: float | None = None) -> Callable[[str, Any, Path], dict[str, Any]]:
    many = _many(kind, what, least)

    def read(key: str, value: Any, path: Path) -> dict[str, Any]:
        if isinstance(value, list):
            raise LongtakeError(f"{key}: {value!r}; give {what}, one for the whole matrix")
        return {} if value is None else {key: many(key, value, path)[key][0]}

    return read


def _specs(key: str, value: Any, path: Path) -> dict[str, Any]:
    # YAML reads `none` as text, but an empty value, `null` and `~` as nothing
    values = [("none" if each is None else each) for each in (value if isinstance(value, list) else [value])]
    return _many(str, "text as on the command line")(key, values, path)


def _prompts(key: str, value: Any, path: Path) -> dict[str, Any]:
    if isinstance(value, str):
        beside = path.parent / value
        if value.endswith(".txt") or beside.is_file():
            return {key: parse_prompts(beside)}
    return _many(str, "a prompt")(key, value, path)


def _seeds(key: str, value: Any, path: Path) -> dict[str, Any]:
    found = _many(int, "how many, or a list of seeds", 0)(key, value, path)
    if isinstance(value, list):
        return found
    if value < 1:
        raise LongtakeError(f"{key}: {value}; give at least 1")
    return {key: tuple(range(value))}


def _size(key: str, value: Any, path: Path) -> dict[str, Any]:
    found = re.fullmatch(r"(\d+)\s*[x×X*]\s*(\d+)", str(value).strip())
    if not found:
        raise LongtakeError(f"{key}: {value!r}; write WIDTHxHEIGHT in pixels, e.g. 832x480")
    return {"height": int(found[2]), "width": int(found[1])}


_KEYS: dict[str, Callable[[str, Any, Path], dict[str, Any]]] = {
    "models": _many(str, "a model's name or folder"), "policies": _specs,
    "budgets": _many(int, "a number of latent frames", 1), "reuse": _specs, "prompts": _prompts, "seeds": _seeds,
    "seconds": _many(float, "seconds above 0", 1e-3), "chunks": _many(int, "a number of chunks", 1), "size": _size,
    "steps": _one(int, "a number of steps", 1), "guidance": _one(float, "a number", 0.0), "negative": _one(str, "text"),
}  # fmt: skip

_OF = {False: "of free takes (with protocols: of the procedural world)", True: "of the procedural world"}
_OPTIONS = {
    "protocols": "protocol", "models": "model", "policies": "policy", "budgets": "budget", "gaps": "gap",
    "compressors": "compressor",
}  # fmt: skip
_WORLD: dict[str, Callable[[str, Any, Path], dict[str, Any]]] = {
    "protocols": _many(str, "A, B or L"), "models": _KEYS["models"], "policies": _specs, "budgets": _KEYS["budgets"],
    "compressors": _many(str, "own, a compressor's name or folder"), "seeds": _one(int, "how many scenes", 1),
    "frames": _one(int, "a number of latent frames", 1), "free": _one(int, "a number of latent frames", 1),
    "gaps": _many(int, "a number of latent frames", 1), "against": _one(str, "one of the policies"),
    "as_given": _one(bool, "true or false"),
}  # fmt: skip
