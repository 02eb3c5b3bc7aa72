"""Build nested dataclasses from plain data (as YAML gives it), refusing what their types do not say."""

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_PLAIN = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a mapping"}


class FieldError(ValueError):
    """A value that does not fit its field; the message begins with the field's full path."""


def build(cls: type[T], raw: object, path: str = "") -> T:
    """Build an instance of a dataclass from a mapping, checking every field by its type, nested ones too.

    Args:
        cls: a dataclass whose fields are bool, int, float, str, dict, a Literal, such another dataclass,
            `tuple[X, ...]` or `X | None` of these.
        raw: a mapping of field names to values.
        path: where `raw` stands in the whole, for messages; empty at the top.

    Raises:
        FieldError: an unknown or missing key, a value of the wrong type, or one that `__post_init__` refuses.
    """
    if not isinstance(raw, Mapping):
        raise FieldError(f"{path or 'the whole'} must be a section with keys, not {_show(raw)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # any dataclass
    for key in raw:
        if key not in fields:
            raise FieldError(f"{_join(path, key)} is not a known key{_suggest(str(key), list(fields))}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in raw:
            raise FieldError(f"{_join(path, name)} is missing, and it has no default")
    hints = get_type_hints(cls)
    values = {key: _convert(hints[key], value, _join(path, key)) for key, value in raw.items()}
    try:
        return cls(**values)
    except ValueError as error:  # what __post_init__ refuses
        raise FieldError(f"{path}: {error}" if path else str(error)) from error


def _convert(hint: Any, value: object, path: str) -> Any:
    """Check a value against a type. A whole number is good for a float; nothing else is bent."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        [other] = [a for a in arguments if a is not type(None)]
        return None if value is None else _convert(other, value, path)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise FieldError(f"{path} must be one of {', '.join(map(str, arguments))}, not {_show(value)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise FieldError(f"{path} must be a list, such as [a, b], not {_show(value)}")
        return tuple(_convert(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path)  # type: ignore[arg-type]  # a class, not an instance
    if hint is float:
        return _number(value, path)
    if type(value) is not (origin or hint):
        raise FieldError(f"{path} must be {_PLAIN[origin or hint]}, not {_show(value)}")
    return value


def _number(value: object, path: str) -> float:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)  # of text too: YAML 1.1 reads 1e-4, without a dot, as text
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    raise FieldError(f"{path} must be a number, not {_show(value)}")


def to_plain(value: Any) -> Any:
    """Turn dataclasses and tuples back into what YAML and JSON hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    return value


def _suggest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}"


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _show(value: object) -> str:
    return "nothing" if value is None else repr(value)
