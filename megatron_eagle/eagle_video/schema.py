"""Structured answers: the JSON in a model's text, and a check against the part of JSON Schema used here.

Known words: type, properties, required, items, enum, minItems, maxItems, minLength.  `example` stands for a
value in a dry run.
"""

import json
import re
from typing import Any

_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
}
_FENCE = re.compile(r"^\s*```[a-zA-Z]*\s*\n(.*)\n\s*```\s*$", re.DOTALL)


def parse_answer(text: str, schema: dict[str, Any]) -> Any:
    """The JSON value of an answer, also out of a code fence.

    Raises:
        ValueError: it is not JSON, or does not fit the schema; the message says why.
    """
    match = _FENCE.match(text)
    try:
        value = json.loads(match[1] if match else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the answer is not JSON: {error}") from None
    if problem := _mismatch(value, schema, "the answer"):
        raise ValueError(problem)
    return value


def example(schema: dict[str, Any]) -> Any:
    """A value that fits the schema."""
    if "example" in schema:
        return schema["example"]
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type")
    if kind == "object":
        return {key: example(part) for key, part in schema.get("properties", {}).items()}
    if kind == "array":
        return [example(schema.get("items", {}))] * schema.get("minItems", 1)
    if kind == "boolean":
        return False
    return 0 if kind in ("integer", "number") else "x" * schema.get("minLength", 1)


def _mismatch(value: Any, schema: dict[str, Any], where: str) -> str | None:
    """What is wrong with a value, None if nothing is."""
    kind = schema.get("type")
    # bool is a subclass of int
    if kind and (
        not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind in ("integer", "number"))
    ):
        return f"{where} must be of type {kind}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} must be one of {', '.join(map(str, schema['enum']))}"
    if isinstance(value, str) and len(value.strip()) < schema.get("minLength", 0):
        return f"{where} is too short"
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return f"{where} has {len(value)} items"
        parts = [(item, schema.get("items", {}), f"{where}[{i}]") for i, item in enumerate(value)]
    elif isinstance(value, dict):
        if missing := [key for key in schema.get("required", ()) if key not in value]:
            return f"{where} has no {missing[0]!r}"
        known = schema.get("properties", {})
        parts = [(value[key], known[key], f"{where}.{key}") for key in known if key in value]
    else:
        parts = []
    return next((p for part in parts if (p := _mismatch(*part))), None)
