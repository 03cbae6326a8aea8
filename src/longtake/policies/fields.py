"""What every policy asks of its options first: that they are of the types their fields say.

A number that came as text would otherwise fail somewhere inside a take, and one no machine has memory for in the
allocator.
"""

from __future__ import annotations

import math
import types
import typing
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

from ..errors import LongtakeError
from ..named import accepted, own_name, type_name

MOST = 10**9  # frames, chunks or tokens: a video of years
MOST_BYTES = 2**50
_PLAIN = (int, float, bool, str, type(None))


def check_fields(policy: Any) -> None:
    """Raise LongtakeError, naming the field, for a value of another type than its own, for a number that is not finite
    and for a count beyond everything. Numbers of other libraries become Python's own.

    Fields of other types than numbers, truth, text and none are left to the policy."""
    title = own_name(type(policy)) or type(policy).__name__
    for name, options in _types(type(policy)).items():
        value = getattr(policy, name)
        given = f"{title}: {name}={value!r}"
        if (plain := _plain(value, options)) is None and value is not None:
            words = " | ".join(type_name(option) for option in options)
            raise LongtakeError(f"{given} is not {words}: give {accepted(options)}")
        if value is None and type(None) not in options:
            raise LongtakeError(f"{given}: give {accepted(options)}")
        if type(plain) is float and not math.isfinite(plain):
            raise LongtakeError(f"{given}: give a finite number")
        most = MOST_BYTES if name.endswith("bytes") else MOST
        if type(plain) is int and name != "seed" and abs(plain) > most:
            raise LongtakeError(f"{given}: give {most} at most")
        if plain is not value:
            object.__setattr__(policy, name, plain)


def _plain(value: Any, options: tuple[Any, ...]) -> Any:
    """The value as Python's own number, or as it is; None if it is of none of the types."""
    if type(value) in options:
        return value
    if isinstance(value, str):  # of an enumeration, say
        return value if str in options else None
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):  # NumPy's is no Python bool
        return bool(value) if bool in options else None
    if isinstance(value, Integral) and int in options:
        return int(value)
    if isinstance(value, Real) and float in options:
        return int(value) if isinstance(value, Integral) else float(value)
    return None


def _types(cls: type[Any]) -> dict[str, tuple[Any, ...]]:
    """The fields of plain types, and which those are."""
    try:
        hints = typing.get_type_hints(cls)
    except (NameError, TypeError):  # a user's annotations need not be there at run time
        return {}
    found = {}
    for field in fields(cls):
        hint = hints[field.name]
        options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
        if field.init and all(option in _PLAIN for option in options):
            found[field.name] = options
    return found
