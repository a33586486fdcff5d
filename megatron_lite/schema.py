"""Plain YAML values to a tree of dataclasses, strictly: an unknown key or a wrong type is an error that says where."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal, TypeVar, cast

T = TypeVar("T")


def parse(cls: type[T], data: dict[str, Any], where: str, prefix: str = "") -> T:
    """A dict to a dataclass, strictly: unknown keys and wrong types are a ValueError that says where."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: {prefix.rstrip('.') or 'the file'} must be a mapping of keys, got {data!r}")
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            raise ValueError(f"{where}: unknown key {prefix + str(key)!r}.{nearest(str(key), hints)}")
    values = {k: _convert(hints[k], v, where, prefix + k) for k, v in data.items()}
    return cls(**values)


def nearest(key: str, known: typing.Iterable[str]) -> str:
    """`` Did you mean 'x'?`` with the nearest known key, or the list of known keys."""
    names = sorted(known)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(names)}"


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    """Checks and converts one YAML value to its annotated type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where, key)
    if dataclasses.is_dataclass(hint):
        return parse(cast(type, hint), value, where, key + ".")
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where}: {key} must be one of {', '.join(map(str, args))}, got {value!r}")
        return value
    if origin is tuple:
        return _convert_sequence(args, value, where, key)
    if origin is dict:
        if isinstance(value, dict):
            return {
                str(k): v if args[1] is Any else _convert(args[1], v, where, f"{key}.{k}") for k, v in value.items()
            }
        raise ValueError(f"{where}: {key} must be a mapping, got {value!r}")
    return _convert_scalar(hint, value, where, key)


def _convert_sequence(args: tuple[Any, ...], value: Any, where: str, key: str) -> tuple[Any, ...]:
    open_ended = len(args) == 2 and args[1] is Ellipsis
    if not isinstance(value, list | tuple) or (not open_ended and len(value) != len(args)):
        raise ValueError(f"{where}: {key} must be a list{'' if open_ended else f' of {len(args)}'}, got {value!r}")
    kinds = [args[0]] * len(value) if open_ended else list(args)
    return tuple(_convert(a, v, where, f"{key}[{i}]") for i, (a, v) in enumerate(zip(kinds, value, strict=True)))


def _convert_scalar(hint: Any, value: Any, where: str, key: str) -> Any:
    if hint is Any or (hint is bool and isinstance(value, bool)) or (hint is str and isinstance(value, str)):
        return value
    if hint in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 1e9 as text: accept it as the number it is
        except (TypeError, ValueError):
            number = float("nan")
        if hint is float and number == number:
            return number
        if hint is int and number == number and abs(number) != float("inf") and number == int(number):
            return value if isinstance(value, int) else int(number)
    raise ValueError(f"{where}: {key} must be {getattr(hint, '__name__', hint)}, got {value!r}")
