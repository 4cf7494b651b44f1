"""The examples of a TFRecord file: `tf.train.Example` messages, read without TensorFlow.

A record is its length (8 bytes, little-endian), a checksum of that (4), the message, and its checksum (4). No
checksum is looked at: a message that is damaged is no message, or has no picture in it.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LENGTH = struct.Struct("<QI")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # how a field of a message is written
_FLOATS, _INTEGERS = 2, 3  # fields of a `Feature`, besides 1, its bytes


def read_examples(path: Path) -> Iterator[dict[str, Any]]:
    """Each example's features by name: a list, or its one value; bytes that are text come as text.

    Raises:
        ValueError: the file is cut off, or its records are no examples.
    """
    with path.open("rb") as file:
        while head := file.read(_LENGTH.size):
            length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else -1
            rest = path.stat().st_size - file.tell() - 4
            if not 0 <= length <= rest:
                raise ValueError(f"the record at byte {file.tell() - len(head)} is cut off")
            message = file.read(length)
            file.read(4)
            yield _features(message)


def _features(example: bytes) -> dict[str, Any]:
    features = {}
    for _, entries in _fields(example):
        for _, entry in _fields(entries):
            pair = dict(_fields(entry))
            values = [value for field, body in _fields(pair.get(2, b"")) for value in _values(field, body)]
            features[_text(pair[1])] = values[0] if len(values) == 1 else values
    return features


def _values(field: int, body: bytes) -> list[Any]:
    values: list[Any] = []
    for _, value in _fields(body):
        if field == _INTEGERS:
            values += [value] if isinstance(value, int) else _varints(value)
        elif field == _FLOATS:
            values += struct.unpack(f"<{len(value) // 4}f", value)
        else:
            values.append(_text(value))
    return values


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field: bytes, or an integer for a varint."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        size, at = _varint(message, at) if kind == _BYTES else ({_FIXED64: 8, _FIXED32: 4}.get(kind, -1), at)
        if size < 0 or at + size > len(message):
            raise ValueError("a record is no tf.train.Example")
        yield key >> 3, message[at : at + size]
        at += size


def _varints(packed: bytes) -> list[int]:
    values, at = [], 0
    while at < len(packed):
        value, at = _varint(packed, at)
        values.append(value)
    return values


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value - (1 << 64) if value >> 63 else value, at
    raise ValueError("a record is no tf.train.Example")


def _text(value: bytes) -> Any:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value
