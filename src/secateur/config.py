"""Strict configuration: frozen dataclasses, canonical JSON, fingerprints.

``@spec`` marks a class whose fields come from a user's file. At that boundary pydantic checks types and ranges and
refuses unknown keys; afterwards a spec is a plain frozen dataclass. A field is *identity* (it changes the result)
unless it is annotated with :data:`RUNTIME` (device, number of jobs, paths); only identity enters a fingerprint.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from secateur.errors import UserError, did_you_mean

__all__ = [
    "RUNTIME",
    "Count",
    "Fraction",
    "Listed",
    "Positive",
    "canonical_json",
    "fingerprint",
    "identity",
    "load_yaml",
    "parse",
    "parse_count",
    "parse_value",
    "spec",
]

T = TypeVar("T")

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}


def parse_count(value: object) -> int:
    """Turn ``700_000``, ``7e5``, ``"700k"``, ``"0.7M"`` or ``"50B"`` into an int.

    Raises:
        ValueError: if the value is no number, is negative, or is not whole.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a count such as 700000, 700k or 50e9")
    match = re.fullmatch(r"\s*([0-9.]+(?:e\+?[0-9]+)?)\s*([kmbgt]?)\s*", str(value).replace("_", "").lower())
    try:
        number = float(match[1]) * _SUFFIXES[match[2]] if match else float("nan")
    except ValueError:
        number = float("nan")
    if number != number or number in (float("inf"),) or abs(number - round(number)) > 1e-6:
        raise ValueError(f"{value!r} is not a whole count such as 700000, 700k or 50e9")
    return round(number)


Count = Annotated[int, BeforeValidator(parse_count), Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, dataclasses.Field))
def spec(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen keyword-only dataclass that checks its fields wherever it is made.

    A field out of range is a UserError that names it; unknown keys are errors when it is parsed from a file.
    """
    own_check = cls.__dict__.get("__post_init__")

    def __post_init__(self: Any) -> None:
        _check_fields(self)
        if own_check:
            own_check(self)

    cls.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[attr-defined]
    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def _check_fields(value: Any) -> None:
    """Validate each field of a spec against its annotation; a count such as "50M" becomes a number."""
    for name, adapter in _field_adapters(type(value)):
        try:
            checked = adapter.validate_python(_tuples(getattr(value, name)))
        except ValidationError as error:
            raise UserError(f"`{name}`{_explain(type(value), error)}") from None
        object.__setattr__(value, name, checked)


@functools.cache
def _field_adapters(cls: type) -> list[tuple[str, TypeAdapter[Any]]]:
    hints = get_type_hints(cls, include_extras=True)
    strict = ConfigDict(strict=True, arbitrary_types_allowed=True)
    return [(f.name, _adapter(hints[f.name], strict)) for f in dataclasses.fields(cls)]  # type: ignore[arg-type]


def _adapter(hint: Any, config: ConfigDict) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=None if dataclasses.is_dataclass(hint) else config)


def _tuples(value: Any) -> Any:
    """Lists as tuples: Python callers may give either."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


#: Marks a field, as ``Annotated[int, RUNTIME]``, that says how to run and not what to compute.
RUNTIME = object()


@dataclasses.dataclass(frozen=True)
class Listed:
    """Marks a tuple, as ``Annotated[tuple[int, ...], Listed()]``, of which a file may give one entry without a list.

    With a ``key``, a word stands for an entry that is a mapping and says only that key.
    """

    key: str | None = None

    def widen(self, value: Any) -> Any:
        """The list that ``value`` stands for."""
        items = value if isinstance(value, list) or value is None else [value]
        if self.key is None or items is None:
            return items
        return [{self.key: item} if isinstance(item, str) else item for item in items]


@functools.cache
def _runtime_fields(cls: type) -> frozenset[str]:
    hints = get_type_hints(cls, include_extras=True)
    return frozenset(name for name, hint in hints.items() if RUNTIME in getattr(hint, "__metadata__", ()))


def identity(value: Any) -> Any:
    """Reduce specs to JSON values, leaving runtime fields out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: identity(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if f.name not in _runtime_fields(type(value))
        }
    if isinstance(value, Mapping):
        return {str(k): identity(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [identity(v) for v in value]
    return value


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, NaN refused."""
    return json.dumps(identity(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (``4e-3`` is a number) and no silently repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} appears twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# A pattern such as 2:4 is a word, not a number to the base of 60, as it was in YAML 1.1.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith((":int", ":float"))]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*|[-+]?\.[0-9][0-9_]*|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def load_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        UserError: if the file is missing, unreadable or not YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{path}: {line}not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def parse_value(text: str) -> Any:
    """Read one value as a YAML file would, e.g. from a command line; what is no YAML is the text itself."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def parse(cls: type[T], raw: Any, *, origin: str) -> T:
    """Build the spec ``cls`` from plain JSON-like data.

    Args:
        cls: a class decorated with :func:`spec`.
        raw: mappings, lists, strings, numbers, as read from YAML or JSON.
        origin: what to name in errors, usually the file.

    Raises:
        UserError: one line with the path of the first offending key, and the nearest valid name.
    """
    if not isinstance(raw, Mapping):
        raise UserError(f"{origin}: expected a mapping of keys to values, got {type(raw).__name__}")
    try:
        text = json.dumps(raw)
    except (TypeError, ValueError) as error:
        raise UserError(f"{origin}: holds a value that is not plain data: {error}") from None
    try:
        return TypeAdapter(cls).validate_json(json.dumps(_widened(cls, json.loads(text))))
    except ValidationError as error:
        raise UserError(f"{origin}: {_explain(cls, error)}") from None


def _widened(hint: Any, raw: Any) -> Any:
    """``raw`` with lists wherever :class:`Listed` says what stands for one."""
    if get_origin(hint) is Annotated:
        hint, *marks = get_args(hint)
        for mark in marks:
            raw = mark.widen(raw) if isinstance(mark, Listed) else raw
        return _widened(hint, raw)
    if dataclasses.is_dataclass(hint) and isinstance(raw, dict):
        hints = get_type_hints(hint, include_extras=True)
        return {key: _widened(hints.get(key), value) for key, value in raw.items()}
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for argument in arguments:
            raw = _widened(argument, raw)
    elif origin is tuple and isinstance(raw, list):
        return [_widened(arguments[0], item) for item in raw]
    elif origin in (Mapping, dict) and isinstance(raw, dict):
        return {key: _widened(arguments[1], value) for key, value in raw.items()}
    return raw


def _explain(cls: type, error: ValidationError) -> str:
    details = error.errors(include_url=False)
    # An unknown key explains a missing one (a misspelt name causes both), so it is told first.
    details.sort(key=lambda d: d["type"] not in ("unexpected_keyword_argument", "extra_forbidden"))
    first = details[0]
    loc = [part for part in first["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".")
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    kind, shown = first["type"], first.get("input")
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        text = f"unknown key{did_you_mean(loc[-1], _keys_at(cls, loc[:-1]))}"
    elif kind in ("missing", "missing_argument"):
        text = "this key is required"
    elif kind == "literal_error":
        options = re.findall(r"'([^']*)'", first.get("ctx", {}).get("expected", ""))
        text = f"{shown!r} is not known{did_you_mean(shown, options)}"
    elif kind == "value_error":
        text = str(first.get("ctx", {}).get("error", first["msg"]))
    else:
        message = first["msg"].removeprefix("Input ").removeprefix("should be ").strip()
        given = f" (got {shown!r})" if isinstance(shown, str | int | float | bool | None) else ""
        text = f"should be {message}{given}"
    return f"{where}: {text}{more}"


def _keys_at(cls: Any, loc: list[Any]) -> list[str]:
    """The names of the fields of the spec that lies at ``loc`` below ``cls``."""
    candidates = _specs_in(cls)
    for part in loc:
        if isinstance(part, int):
            continue
        below = []
        for candidate in candidates:
            hints = get_type_hints(candidate, include_extras=True)
            if part in hints:
                below += _specs_in(hints[part])
        candidates = below or candidates
    return sorted({f.name for candidate in candidates for f in dataclasses.fields(candidate)})


def _specs_in(hint: Any) -> list[Any]:
    if dataclasses.is_dataclass(hint):
        return [hint]
    if get_origin(hint) in (Union, types.UnionType, tuple, list, dict, Mapping, Annotated):
        return [found for arg in get_args(hint) for found in _specs_in(arg)]
    return []
