"""Configuration machinery: dataclasses from YAML plus `a.b=c` overrides, strict in names and in types.

The dataclasses themselves live beside what they configure; this file knows none of them. Every mistake a user
can make in a file or in an override is one `UserError` line with the dotted place of the value.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from megatron_eagle.errors import UserError

T = TypeVar("T")


class _Mismatch(UserError):
    """A value of the wrong type (tried and passed over while a union's members are tried in turn)."""


def from_dict(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `cls`, nested dataclasses included, from plain YAML values.

    Accepted beside exact types: an int or a numeric text (YAML 1.1 reads `2e-5` as text) for a float, a list
    for a tuple.

    Args:
        cls: may name in `FORMER` settings of earlier versions, each with the one value that it may have.
        where: the dotted place of `mapping` in the whole configuration, for messages.

    Raises:
        UserError: unknown key (with the nearest valid one), missing key, wrong type, a value outside a
            `Literal` or its declared range (`ranges`), or what the dataclass' own `__post_init__` refuses,
            with `UserError` or with a `ValueError` that begins with the field's name.
    """
    if not isinstance(mapping, Mapping):
        raise _Mismatch(f"{where or 'configuration'}: expected a mapping of settings, got {_show(mapping)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]  # T is one
    mapping = _without_former(mapping, getattr(cls, "FORMER", {}), where)
    for key in mapping:
        if key not in fields:
            raise UserError(_unknown_key(key, list(fields), where))
    values = {name: _convert(hints[name], value, _join(where, name)) for name, value in mapping.items()}
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{_join(where, name)}: missing, it has no default; add it to the configuration")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(_join(where, error)) from error  # it begins with the name of a field


def _without_former(mapping: Mapping[str, Any], former: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Settings of earlier versions that had one legal value, which they may still say."""
    for name, only in former.items():
        if mapping.get(name, only) != only:
            value = f"{_join(where, name)} is {_show(mapping[name])}"
            raise UserError(f"{value}: must be {_show(only)} or left out")
    return {name: value for name, value in mapping.items() if name not in former}


def to_dict(obj: Any) -> Any:
    """The plain YAML form (dicts, lists, scalars) of a dataclass; `from_dict` reads it back."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {f.name: to_dict(getattr(obj, f.name)) for f in dataclasses.fields(obj) if f.init}
    if isinstance(obj, Mapping):
        return {key: to_dict(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [to_dict(value) for value in obj]
    return str(obj) if isinstance(obj, Path) else obj


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping (an empty file is an empty one).

    Raises:
        UserError: the file is missing, unreadable, no valid YAML, names a key twice, or is no mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read this configuration file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8") from error
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {_yaml_problem(error)}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a mapping of settings at the top level, got {_show(value)}")
    return value


def save_yaml(obj: Any, path: str | Path) -> None:
    """Write a dataclass (or a plain mapping) as YAML, keys in the order of definition."""
    Path(path).write_text(yaml.safe_dump(to_dict(obj), sort_keys=False, allow_unicode=True), encoding="utf-8")


def apply_overrides(mapping: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `mapping` with each `a.b=value` put in place; values are parsed as YAML (empty means null).

    Names are not checked here: `from_dict` does that with the whole configuration in hand.

    Raises:
        UserError: an override without `=`, with an empty name, or that goes through a plain value.
    """
    result: dict[str, Any] = _copy(mapping)
    for override in overrides:
        name, equals, text = override.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts):
            raise UserError(f"override {override!r}: expected NAME=VALUE with a dotted name, as in a.b=c")
        try:
            value = _parse(text)
        except yaml.YAMLError as error:
            raise UserError(
                f"override {override!r}: the value is not valid YAML: {_yaml_problem(error)}"
            ) from error
        node = result
        for depth, part in enumerate(parts[:-1], start=1):
            if node.get(part) is None:  # absent, or an empty section
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                raise UserError(f"override {override!r}: {'.'.join(parts[:depth])} is a value, not a section")
        node[parts[-1]] = value
    return result


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name a typo most probably meant, or None if nothing is close."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return matches[0] if matches else None


class _StrictLoader(yaml.SafeLoader):
    """`yaml.SafeLoader` silently keeps the last of two equal keys; a run must not depend on that."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} appears twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _parse(text: str) -> Any:
    """YAML to plain values, as `yaml.safe_load` does, with duplicate keys refused."""
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    except ValueError as error:  # a date or a number that Python cannot hold
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `hint`.

    Raises:
        UserError: it is none; `where` is named.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is Literal:
        # `True == 1`: compare types too, so that a switch is not taken for a number.
        if any(value == allowed and type(value) is type(allowed) for allowed in arguments):
            return value
        guess = (
            nearest(value, [a for a in arguments if isinstance(a, str)]) if isinstance(value, str) else None
        )
        hint_text = f" (did you mean {guess!r}?)" if guess else ""
        raise UserError(
            f"{where}: {_show(value)} is not one of {', '.join(map(_show, arguments))}{hint_text}"
        )
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, {} if value is None else value, where)  # `section:` with nothing under it
    if origin in (list, tuple) or hint in (list, tuple):
        return _convert_sequence(origin or hint, arguments, value, where)
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise _wrong_type("a mapping", value, where)
        key_hint, value_hint = arguments or (Any, Any)
        return {
            _convert(key_hint, k, where): _convert(value_hint, v, _join(where, k)) for k, v in value.items()
        }
    return _convert_scalar(hint, value, where)


def _convert_union(members: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in members:
        return None
    errors = []
    for member in (m for m in members if m is not type(None)):
        try:
            return _convert(member, value, where)
        except _Mismatch as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise _wrong_type(" or ".join(_name(m) for m in members), value, where)


def _convert_sequence(kind: type, arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong_type("a list", value, where)
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise _wrong_type(f"a list of {len(arguments)}", value, where)
        return tuple(
            _convert(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(arguments, value, strict=True))
        )
    item_hint = arguments[0] if arguments else Any
    return kind(_convert(item_hint, v, f"{where}[{i}]") for i, v in enumerate(value))


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise _wrong_type("a number", value, where) from None
        if not math.isfinite(number):
            raise _wrong_type("a finite number", value, where)
        return number
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is str and value == "":  # as a folder it would be the working directory
        raise _wrong_type("text that is not empty", value, where, "; leave it out for the default")
    # bool is a subclass of int: `steps: true` must not become 1.
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        if isinstance(value, int) and hint is int and value.bit_length() > 64:
            raise _wrong_type("a whole number of at most 64 bits", value, where)
        return value
    quote = (
        "; put it in quotes"
        if hint is str and value is not None and not isinstance(value, dict | list)
        else ""
    )
    raise _wrong_type(_name(hint), value, where, quote)


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def _name(hint: Any) -> str:
    return _NAMES.get(hint) or str(getattr(hint, "__name__", hint))


def _wrong_type(expected: str, value: Any, where: str, advice: str = "") -> _Mismatch:
    return _Mismatch(f"{where}: expected {expected}, got {_show(value)}{advice}")


def _unknown_key(key: Any, valid: list[str], where: str) -> str:
    guess = nearest(str(key), valid)
    advice = f"did you mean {_join(where, guess)!r}?" if guess else f"valid here: {', '.join(valid)}"
    return f"unknown setting {_join(where, str(key))!r}; {advice}"


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to write the longest
        return f"a whole number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _join(where: str, name: Any) -> str:
    return f"{where}.{name}" if where else str(name)


def _copy(value: Any) -> Any:
    """Deep copy of plain YAML values; mappings become dicts that overrides may write to."""
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _yaml_problem(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    mark = getattr(error, "problem_mark", None)
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else problem
