"""Reading JSON into dataclasses by their type hints: what is missing, unknown or of another kind is said with its
place in the file."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..errors import LongtakeError


def decode(kind: Any, value: Any, place: str = "") -> Any:
    """`value`, as `json.load` gave it, as the type `kind`: dataclasses, lists, tuples, dicts with text keys, unions and
    plain values, nested. A class with a classmethod `read` reads itself.

    Raises LongtakeError with the path of the first value that does not fit.
    """
    if kind is Any:
        return value
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _any_of(inner, value, place)
    if kind is None or kind is type(None):
        return value if value is None else _refuse(place, "null", value)
    if origin is list:
        return [decode(inner[0], v, f"{place}[{i}]") for i, v in enumerate(_of(list, value, place))]
    if origin is tuple:
        items = _of(list, value, place)
        if inner[-1] is not Ellipsis and len(inner) != len(items):
            _refuse(place, f"a list of {len(inner)}", value)
        kinds = inner[:1] * len(items) if inner[-1] is Ellipsis else inner
        return tuple(decode(k, v, f"{place}[{i}]") for i, (k, v) in enumerate(zip(kinds, items, strict=True)))
    if origin is dict:
        return {k: decode(inner[1], v, f"{place}.{k}") for k, v in _of(dict, value, place).items()}
    if hasattr(kind, "read"):
        return kind.read(_of(dict, value, place), place)
    if is_dataclass(kind):
        return record(kind, _of(dict, value, place), place)
    if kind is float and type(value) is int:
        return float(value)
    return _of(kind, value, place)


def record(kind: Any, row: Mapping[str, Any], place: str = "") -> Any:
    """A dataclass of a JSON object that has its fields and no others; those with defaults may be left out."""
    hints = _hints(kind)
    known = {f.name: f for f in fields(kind) if f.init}
    if unknown := sorted(row.keys() - known.keys()):
        raise LongtakeError(f"{place or kind.__name__}: nothing here is named {unknown[0]!r}")
    given = {}
    for name, field in known.items():
        if name in row:
            given[name] = decode(hints[name], row[name], f"{place}.{name}".lstrip("."))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise LongtakeError(f"{place or kind.__name__}: {name!r} is missing")
    return kind(**given)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _any_of(kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    """The first of the kinds that fits; null fits null alone, so that the other kind is what an error speaks of."""
    likely = [kind for kind in kinds if (kind is type(None)) == (value is None)] or list(kinds)
    for kind in likely[:-1]:
        try:
            return decode(kind, value, place)
        except LongtakeError:
            continue
    return decode(likely[-1], value, place)


def _of(kind: type, value: Any, place: str) -> Any:
    if type(value) is not kind:  # exactly: True is no number here
        words: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}
        _refuse(place, words.get(kind, kind.__name__), value)
    return value


def _refuse(place: str, wanted: str, value: Any) -> Any:
    raise LongtakeError(f"{place or 'the file'} is {str(value)[:40]!r}, not {wanted}")
