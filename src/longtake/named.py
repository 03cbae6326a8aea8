"""Policies by name: for the command line, for snapshots, for tables. A policy registers by being a subclass."""

from __future__ import annotations

import importlib.util
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from .errors import LongtakeError

T = TypeVar("T")


@dataclass(frozen=True)
class Registry(Generic[T]):
    """The named subclasses of `base`, which error messages call a `kind`.

    A class may say with `bare` which of its fields a value without a key is for: `flowcache:slow`.
    """

    base: type[T]
    kind: str

    def available(self) -> dict[str, type[T]]:
        """Every class with a name of its own, by name; an inherited one would take its base's place."""
        return {own_name(cls): cls for cls in (self.base, *_subclasses(self.base)) if own_name(cls)}

    def build(self, name: str, options: dict[str, Any]) -> T:
        """The policy `name` with `options`. Raises LongtakeError for an unknown name, key or value."""
        known = self.available()
        if name not in known:
            short = self.kind.rpartition(" ")[2]
            hint = "" if name else f"; of a class without a name of its own, pass the {short} itself"
            raise LongtakeError(f"no {self.kind} {name!r}; known: {', '.join(sorted(known))}{hint}")
        return self._instance(known[name], options)

    def parse(self, spec: str) -> T:
        """`name`, `name:key=value,…` or `my_file.py:MyPolicy[:key=value,…]`, as the command line has it."""
        head, _, rest = spec.partition(":")
        if head.endswith(".py"):
            name, _, rest = rest.partition(":")
            cls = self._from_file(Path(head), name)
        else:
            known = self.available()
            if head not in known:
                return self.build(head, {})
            cls = known[head]
        return self._instance(cls, self._options(rest, getattr(cls, "bare", None)))

    def _options(self, text: str, bare: str | None) -> dict[str, str]:
        options = {}
        for pair in filter(None, text.split(",")):
            key, equals, value = pair.partition("=")
            if not equals and bare is not None:
                key, value = bare, pair
            elif not equals:
                raise LongtakeError(f"{self.kind} option {pair!r}: write key=value, several separated by commas")
            if key.strip() in options:
                raise LongtakeError(f"{self.kind} option {key.strip()!r} is given twice: give one value")
            options[key.strip()] = value.strip()
        return options

    def _instance(self, cls: type[T], options: dict[str, Any]) -> T:
        title = f"{self.kind} {own_name(cls) or getattr(cls, 'name', '') or cls.__name__}"
        if abstract := ", ".join(sorted(getattr(cls, "__abstractmethods__", ()))):
            raise LongtakeError(f"{title} does not define {abstract}: every policy needs that")
        types_of = typing.get_type_hints(cls)
        accepted = {f.name: types_of[f.name] for f in fields(cls) if f.init} if is_dataclass(cls) else {}
        values = {}
        for key, value in options.items():
            if key not in accepted:
                listed = ", ".join(f"{k} ({type_name(t)})" for k, t in accepted.items()) or "none"
                raise LongtakeError(f"{title} has no option {key!r}; it takes: {listed}")
            values[key] = _cast(title, key, value, accepted[key])
        needed = [
            f.name
            for f in (fields(cls) if is_dataclass(cls) else ())
            if f.init and f.default is MISSING and f.default_factory is MISSING
        ]
        if lacking := [name for name in needed if name not in values]:
            raise LongtakeError(f"{title} needs {', '.join(f'{name}=…' for name in lacking)}")
        return cls(**values)

    def _from_file(self, path: Path, name: str) -> type[T]:
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
        base = self.base
        found = {k: v for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, base) and v is not base}
        if name not in found:
            raise LongtakeError(f"{path} has no {base.__name__} {name!r}; it has: {', '.join(found) or 'none'}")
        return found[name]


def describe(policy: Any) -> tuple[str, dict[str, Any]]:
    """Name and fields: what `Registry.build` takes, fit for JSON."""
    return own_name(type(policy)), asdict(policy)


def spec(policy: Any) -> str:
    """A policy as the command line takes it, without what the take fills in; one without a name by its class."""
    name = own_name(type(policy))
    values = ",".join(f"{f.name}={getattr(policy, f.name)}" for f in fields(policy) if f.repr)
    return f"{name or type(policy).__name__}{':' if values else ''}{values}"


def own_name(cls: type[Any]) -> str:
    return vars(cls).get("name", "")


def type_name(to: Any) -> str:
    return to.__name__ if isinstance(to, type) else str(to).replace("typing.", "").replace("NoneType", "none")


def _cast(title: str, key: str, value: Any, to: Any) -> Any:
    """The value as one of the field's types: parsed if it is text, else taken as it is if it has that type."""
    options = typing.get_args(to) if isinstance(to, types.UnionType) else (to,)
    if not isinstance(value, str):
        plain = tuple(typing.get_origin(option) or option for option in options)
        if type(value) in plain or (type(value) is int and float in plain):
            return value
        raise LongtakeError(f"{title}: {key}={value!r} is not {type_name(to)}: give {accepted(options)}")
    # where text is taken too, "none" may be a word of the policy's own (FlowCache's last=none)
    if type(None) in options and (value in ("None", "null") or (str not in options and value.lower() == "none")):
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
    raise LongtakeError(f"{title}: {key}={value!r} is not {type_name(to)}: give {accepted(options)}")


def accepted(types_: Sequence[Any]) -> str:
    """What may be written for a field of one of the types."""
    nothing = "None" if str in types_ else "none"
    words = {int: "a whole number", float: "a number", bool: "true or false", type(None): nothing, str: "text"}
    return " or ".join(words.get(each, type_name(each)) for each in types_)


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
