"""Strict configuration: frozen dataclasses, canonical JSON, fingerprints.

``@spec`` marks a class whose fields come from a user's file. At that boundary pydantic checks types and ranges and
rejects unknown keys; afterwards a spec is a plain frozen dataclass. A field is *identity* (it changes the result)
unless it is annotated with :data:`RUNTIME` (device, number of jobs, paths). A fingerprint covers identity alone.
:class:`IdentityKey` keeps the identities of older records valid when a field is added or renamed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from secateur.errors import UserError, did_you_mean, reason

__all__ = [
    "RUNTIME",
    "AnyPath",
    "Count",
    "Fraction",
    "IdentityKey",
    "Offset",
    "Positive",
    "Proportion",
    "as_share",
    "canonical_json",
    "fingerprint",
    "from_identity",
    "identity",
    "listed",
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
        ValueError: if the value is not a number, is negative, or is not whole.
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


def as_share(value: Any) -> Any:
    """Turn ``"50%"`` into 0.5; return anything else as it is, for the field to check.

    Raises:
        ValueError: for a number above 2, which may be meant as a percentage.
    """
    if isinstance(value, str) and (match := re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*%\s*", value)):
        return float(Decimal(match[1]) / 100)
    if isinstance(value, int | float) and value > 2:
        raise ValueError(f"should be a share between 0 and 1, such as 0.5 or 50% (got {value})")
    return value


def _as_path(value: object) -> object:
    if value is not None and not isinstance(value, str | os.PathLike):
        raise ValueError(f"should be a path, got {type(value).__name__}")
    return value


#: a path, or a result with one (:func:`os.fspath`); None where the field is optional
AnyPath = Annotated[Any, BeforeValidator(_as_path)]
Count = Annotated[int, BeforeValidator(parse_count), Field(gt=0)]
Offset = Annotated[int, BeforeValidator(parse_count), Field(ge=0)]
Fraction = Annotated[float, BeforeValidator(as_share), Field(gt=0, lt=1)]
Proportion = Annotated[float, BeforeValidator(as_share), Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, dataclasses.Field))
def spec(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen keyword-only dataclass that checks its fields when an instance is made.

    An invalid field is a UserError that names it. Unknown keys are errors when a file is parsed.
    """
    check_class = cls.__dict__.get("__post_init__")

    def __post_init__(self: Any) -> None:
        _check_fields(self)
        if check_class:
            check_class(self)

    cls.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[attr-defined]
    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def _check_fields(value: Any) -> None:
    """Validate each field of a spec against its annotation; a count such as "50M" becomes a number."""
    for name, adapter in _field_adapters(type(value)):
        try:
            checked = adapter.validate_python(_tuples(getattr(value, name)))
        except ValidationError as error:
            text = _explain(type(value), error, {name: getattr(value, name)}, (name,))
            raise UserError(f"`{name}`{text.removeprefix(name)}") from None
        object.__setattr__(value, name, checked)


@functools.cache
def _field_adapters(cls: type) -> list[tuple[str, TypeAdapter[Any]]]:
    hints = get_type_hints(cls, include_extras=True)
    strict = ConfigDict(strict=True, arbitrary_types_allowed=True)
    return [(f.name, _adapter(hints[f.name], strict)) for f in dataclasses.fields(cls)]  # type: ignore[arg-type]


def _adapter(hint: Any, config: ConfigDict) -> TypeAdapter[Any]:
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return TypeAdapter(hint, config=None if dataclasses.is_dataclass(kind) else config)


def _tuples(value: Any) -> Any:
    """Turn lists into tuples: Python callers may pass either."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


#: Marks a field that does not change the result, as ``Annotated[int, RUNTIME]``.
RUNTIME = object()


@dataclasses.dataclass(frozen=True)
class IdentityKey:
    """How a field enters the identity, as ``Annotated[int, IdentityKey("old_name")]``."""

    name: str = ""  #: its key there; default: the field's name
    omit: Any = RUNTIME  #: a value that leaves no key, for a field that older identities lack
    value: Callable[[Any], Any] | None = None  #: what is put there of the field's value; default: the value


def listed(key: str | None = None) -> BeforeValidator:
    """Let a file give one entry of a tuple without a list, as in ``Annotated[tuple[int, ...], listed()]``.

    Args:
        key: a string then stands for a mapping with this one key.
    """

    def widen(value: Any) -> Any:
        if value is None:
            return None
        items = value if isinstance(value, list | tuple) else (value,)
        return tuple({key: item} if key and isinstance(item, str) else item for item in items)

    return BeforeValidator(widen)


@functools.cache
def _identity_keys(cls: type) -> Mapping[str, IdentityKey]:
    """Field -> how it enters the identity; without runtime fields."""
    hints = get_type_hints(cls, include_extras=True)
    marks = {f.name: getattr(hints[f.name], "__metadata__", ()) for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return {
        name: next((mark for mark in metadata if isinstance(mark, IdentityKey)), IdentityKey())
        for name, metadata in marks.items()
        if RUNTIME not in metadata
    }


def _same(value: T) -> T:
    return value


def identity(value: Any) -> Any:
    """Reduce specs to JSON values, leaving runtime fields out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            key.name or name: identity((key.value or _same)(getattr(value, name)))
            for name, key in _identity_keys(type(value)).items()
            if getattr(value, name) != key.omit
        }
    if isinstance(value, Mapping):
        return {str(k): identity(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [identity(v) for v in value]
    return value


def from_identity(cls: type[T], raw: Mapping[str, Any], *, origin: str) -> T:
    """Build the spec ``cls`` from its identity, with runtime fields or without.

    Raises:
        UserError: as :func:`parse`.
    """
    names = {key.name or name: name for name, key in _identity_keys(cls).items()}
    return parse(cls, {names.get(key, key): value for key, value in raw.items()}, origin=origin)


def canonical_json(value: Any) -> str:
    """The canonical JSON text of a value: sorted keys, no spaces. NaN is an error."""
    return json.dumps(identity(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _read_yaml(text: str) -> Any:
    """Plain values of a YAML 1.2 text; tags that make other Python objects and repeated keys are errors."""
    return YAML(typ="safe", pure=True).load(text)


def load_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        UserError: if the file is missing, unreadable or not YAML, or repeats a key.
    """
    try:
        return _read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from None
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problem = str(error.problem).partition(" with value")[0]
        raise UserError(f"{path}: {line}not valid YAML: {problem}") from None
    except (YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def parse_value(text: str) -> Any:
    """Read one value as a YAML file would, e.g. from a command line; text that is not YAML is returned as it is."""
    try:
        return _read_yaml(text)
    except (YAMLError, ValueError):
        return text


def dump_yaml(value: Any) -> str:
    """The YAML text of plain values, mappings in their own order."""
    writer, text = YAML(typ="safe", pure=True), io.StringIO()
    writer.default_flow_style, writer.width = False, 120
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.dump(value, text)
    return text.getvalue()


def parse(cls: type[T], raw: Any, *, origin: str) -> T:
    """Build the spec ``cls`` from plain JSON-like data.

    Args:
        cls: a class decorated with :func:`spec`.
        raw: mappings, lists, strings, numbers, as read from YAML or JSON.

    Raises:
        UserError: one line with the path of the first invalid key, and the nearest valid name.
    """
    if not isinstance(raw, Mapping):
        kind = "nothing" if raw is None else "a list" if isinstance(raw, list) else repr(raw)
        raise UserError(f"{origin}: expected a mapping of keys to values, got {kind}")
    try:
        text = json.dumps(raw)
    except (TypeError, ValueError) as error:
        raise UserError(f"{origin}: a value is not plain data: {error}") from None
    try:
        return TypeAdapter(cls).validate_json(text)
    except ValidationError as error:
        raise UserError(f"{origin}: {_explain(cls, error, raw)}") from None


#: pydantic's kind of error -> what the value should be
_EXPECTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping of keys to values",
    "mapping_type": "a mapping of keys to values",
    "dataclass_type": "a mapping of keys to values",
}


def _explain(cls: type, error: ValidationError, value: Any, at: tuple[str, ...] = ()) -> str:
    """Describe the first of pydantic's errors in one line, with its place and the number of other places in error.

    Args:
        value: of ``cls``, as plain data.
        at: the keys of the part of it that was validated.
    """
    places: dict[tuple[str | int, ...], list[Any]] = {}
    for detail in error.errors(include_url=False):
        places.setdefault(tuple(_keys_of(cls, detail, value, at)), []).append(detail)
    # Of a value of several possible types, the type that fits best fails furthest inside.
    inner = [loc for loc in places if not any(place[: len(loc)] == loc != place for place in places)]
    # A misspelt name causes an unknown key and a missing one: the unknown key explains both, so it comes first.
    inner.sort(key=lambda loc: not any(_is_unknown(detail) for detail in places[loc]))
    first = inner[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first).lstrip(".")
    more = f" (and {len(inner) - 1} more)" if len(inner) > 1 else ""
    return f"{place}: {_problem(cls, first, places[first])}{more}"


def _is_unknown(detail: Any) -> bool:
    return detail["type"] in ("unexpected_keyword_argument", "extra_forbidden")


def _keys_of(cls: type, detail: Any, value: Any, at: tuple[str, ...]) -> Iterator[str | int]:
    """The keys and indices that lead to an error, without pydantic's names of types and validators."""
    loc, hints = (*at, *detail["loc"]), []
    for number, part in enumerate(loc):
        inside = isinstance(value, Mapping) and part in value
        last = number == len(loc) - 1 and (_is_unknown(detail) or detail["type"].startswith("missing"))
        if isinstance(part, int) or inside or last or part in _keys_at(cls, hints):
            yield part
            hints.append(part)
            if not isinstance(part, int):
                value = value.get(part) if isinstance(value, Mapping) else None
            elif isinstance(value, list | tuple) and part < len(value):  # else the file gave one entry without a list
                value = value[part]


def _problem(cls: type, loc: tuple[str | int, ...], details: list[Any]) -> str:
    """What is wrong with the value at ``loc``: by each type that it might have."""
    details = [detail for detail in details if detail["type"] not in _EXPECTED] or details  # of the type that fits
    first = details[0]
    kind, value, context = first["type"], first.get("input"), first.get("ctx", {})
    if _is_unknown(first):
        return f"unknown key{did_you_mean(loc[-1], _keys_at(cls, list(loc[:-1])))}"
    if kind in ("missing", "missing_argument"):
        return "this key is required"
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", context.get("expected", ""))
        return f"{value!r} is not known{did_you_mean(value, options)}"
    if kind == "value_error":
        return str(context.get("error", first["msg"]))
    if kind in ("too_short", "too_long"):
        bound, limit = ("least", "min_length") if kind == "too_short" else ("most", "max_length")
        entries = "entry" if context[limit] == 1 else "entries"
        return f"needs at {bound} {context[limit]} {entries}, got {context['actual_length']}"
    texts = dict.fromkeys(_EXPECTED.get(detail["type"]) or _expected(detail["msg"]) for detail in details)
    actual = f" (got {value!r})" if isinstance(value, str | int | float | None) else ""
    return f"should {'' if kind == 'string_pattern_mismatch' else 'be '}{', or '.join(texts)}{actual}"


def _expected(message: str) -> str:
    """The end of a message such as ``Input should be less than 1``."""
    return message.partition(" should ")[2].removeprefix("be ") or message


def _keys_at(cls: Any, loc: list[Any]) -> list[str]:
    """The field names of the spec at ``loc`` below ``cls``."""
    candidates = _specs_in(cls)
    for part in loc:
        if isinstance(part, int):
            continue
        nested = []
        for candidate in candidates:
            hints = get_type_hints(candidate, include_extras=True)
            if part in hints:
                nested += _specs_in(hints[part])
        candidates = nested or candidates
    return sorted({f.name for candidate in candidates for f in dataclasses.fields(candidate)})


def _specs_in(hint: Any) -> list[Any]:
    """The specs that a type hint names, inside unions and containers too."""
    if dataclasses.is_dataclass(hint):
        return [hint]
    if get_origin(hint) is Annotated:
        return _specs_in(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType, tuple, list, dict, Mapping):
        return [spec_class for arg in get_args(hint) for spec_class in _specs_in(arg)]
    return []
