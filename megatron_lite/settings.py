"""Settings as frozen dataclasses: read from YAML and ``--set a.b=c``, strictly; written back; hashed; compared.

Precedence: dataclass defaults <- ``base:`` file (one level) <- ``--config`` file <- ``--set``. An unknown key is an
error that names the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import yaml

T = TypeVar("T")


def load_config(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Reads a dataclass tree from YAML and ``a.b=c`` overrides; ``path=None`` starts from the defaults.

    Raises ValueError naming the file or override, the key, the value and the nearest known key.
    """
    data: dict[str, Any] = {}
    if path is not None:
        data = _read_yaml(Path(path))
        base = data.pop("base", None)
        if base is not None:
            data = _merge(_read_yaml(Path(path).parent / base), data)
    config = parse(cls, data, where=str(path) if path is not None else "defaults")
    for text in overrides:
        config = _override(config, text)
    return config


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


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass tree (or a dict) as plain YAML and JSON types; ``parse(cls, to_dict(c))`` gives c back."""
    plain = dataclasses.asdict(cast(Any, config)) if dataclasses.is_dataclass(config) else config
    return cast(dict[str, Any], json.loads(json.dumps(plain)))


def dump(config: Any) -> str:
    """The config as YAML text, every key written out."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def config_hash(config: Any) -> str:
    """16 hex digits that change when any value of the config does."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:16]


def diff(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines ``a.b: old -> new`` for every key in which two config dicts differ."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += diff(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def nearest(key: str, known: typing.Iterable[str]) -> str:
    """`` Did you mean 'x'?`` with the nearest known key, or the list of known keys."""
    names = sorted(known)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(names)}"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such config file") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if data is not None and not isinstance(data, dict):
        raise ValueError(f"{path}: the top level must be a mapping of keys, got {type(data).__name__}")
    return data or {}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value) if both else value
    return out


def _override(config: T, text: str) -> T:
    """Applies one ``a.b=c``; the value is YAML."""
    path, sep, raw = text.partition("=")
    if not sep:
        raise ValueError(f"--set {text}: write it as key=value, e.g. --set optim.lr=3e-4")
    try:
        value: Any = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {text}: the value is not valid YAML: {error}") from None
    for key in reversed(path.strip().replace("-", "_").split(".")):
        value = {key: value}
    return parse(type(config), _merge(to_dict(config), value), where=f"--set {text}")


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
