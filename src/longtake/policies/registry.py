"""Policies by name: for the command line, for snapshots, for tables. A policy registers by being a subclass."""

from __future__ import annotations

import importlib.util
import sys
import traceback
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from ..errors import LongtakeError
from .base import KVPolicy


def available() -> dict[str, type[KVPolicy]]:
    """Every policy class with a name of its own, by name; an inherited one would take its base's place."""
    return {cls.name: cls for cls in _subclasses(KVPolicy) if _own_name(cls)}


def describe(policy: KVPolicy) -> tuple[str, dict[str, Any]]:
    """Name and fields: what `build` takes, fit for JSON."""
    return _own_name(type(policy)), asdict(policy)


def build(name: str, options: dict[str, Any]) -> KVPolicy:
    """The policy `name` with `options`. Raises LongtakeError for an unknown name, key or value."""
    known = available()
    if name not in known:
        hint = "" if name else "; of a class without a name of its own, pass the policy itself as policy="
        raise LongtakeError(f"no policy {name!r}; known: {', '.join(sorted(known))}{hint}")
    return _instance(known[name], options)


def parse(spec: str) -> KVPolicy:
    """`name`, `name:key=value,…` or `my_file.py:MyPolicy[:key=value,…]`, as the command line has it."""
    head, _, rest = spec.partition(":")
    if head.endswith(".py"):
        name, _, rest = rest.partition(":")
        return _instance(_from_file(Path(head), name), _options(rest))
    return build(head, _options(rest))


def _options(text: str) -> dict[str, str]:
    options = {}
    for pair in filter(None, text.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise LongtakeError(f"policy option {pair!r}: write key=value, several separated by commas")
        options[key.strip()] = value.strip()
    return options


def _instance(cls: type[KVPolicy], options: dict[str, Any]) -> KVPolicy:
    if abstract := ", ".join(sorted(cls.__abstractmethods__)):
        raise LongtakeError(f"policy {cls.name or cls.__name__} does not define {abstract}: every policy needs that")
    types_of = typing.get_type_hints(cls)
    accepted = {f.name: types_of[f.name] for f in fields(cls) if f.init} if is_dataclass(cls) else {}
    values = {}
    for key, value in options.items():
        if key not in accepted:
            listed = ", ".join(f"{k} ({_type_name(t)})" for k, t in accepted.items()) or "none"
            raise LongtakeError(f"policy {cls.name or cls.__name__} has no option {key!r}; it takes: {listed}")
        values[key] = _cast(cls, key, value, accepted[key])
    needed = [f.name for f in fields(cls) if f.init and f.default is MISSING and f.default_factory is MISSING]
    if lacking := [name for name in needed if name not in values]:
        raise LongtakeError(f"policy {cls.name or cls.__name__} needs {', '.join(f'{name}=…' for name in lacking)}")
    return cls(**values)


def _cast(cls: type[KVPolicy], key: str, value: Any, to: Any) -> Any:
    """The value as one of the field's types: parsed if it is text, else taken as it is if it has that type."""
    options = typing.get_args(to) if isinstance(to, types.UnionType) else (to,)
    if not isinstance(value, str):
        plain = tuple(typing.get_origin(option) or option for option in options)
        if type(value) in plain or (type(value) is int and float in plain):
            return value
        raise LongtakeError(f"policy {cls.name or cls.__name__}: {key}={value!r} is not {_type_name(to)}")
    if type(None) in options and value.lower() in ("none", "null"):
        return None
    for option in options:
        if option is bool and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if option in (int, float):
            try:
                return option(value)
            except ValueError:
                continue
        if option is str:
            return value
    raise LongtakeError(f"policy {cls.name or cls.__name__}: {key}={value!r} is not {_type_name(to)}")


def _type_name(to: Any) -> str:
    return to.__name__ if isinstance(to, type) else str(to).replace("typing.", "").replace("NoneType", "none")


def _from_file(path: Path, name: str) -> type[KVPolicy]:
    if not path.is_file():
        raise LongtakeError(f"no file {path}: write my_file.py:MyPolicy with the path of a Python file")
    spec = importlib.util.spec_from_file_location(f"longtake_policy_file_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses with postponed annotations look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = path if line is None else f"{path}, line {line}"
        raise LongtakeError(f"{where}: cannot be imported: {type(error).__name__}: {error}") from error
    found = {
        k: v for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, KVPolicy) and v is not KVPolicy
    }
    if name not in found:
        raise LongtakeError(f"{path} has no KVPolicy {name!r}; it has: {', '.join(found) or 'none'}")
    return found[name]


def _own_name(cls: type[KVPolicy]) -> str:
    return vars(cls).get("name", "")


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
