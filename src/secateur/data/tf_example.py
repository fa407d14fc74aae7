"""Read the integer features of serialised ``tf.train.Example`` messages, without TensorFlow.

An Example is, by tensorflow/core/example/example.proto, ``features = 1``, a message whose ``feature = 1`` is a map from
names to messages ``Feature`` with one of ``bytes_list = 1``, ``float_list = 2`` and ``int64_list = 3``; a list has its
values in ``value = 1``. The wire format is that of https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["int64_features"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


def int64_features(message: bytes) -> dict[str, NDArray[np.int64]]:
    """Return the integer features of an Example: name -> int64 [values].

    Raises:
        ValueError: if the bytes are not such a message.
    """
    result: dict[str, NDArray[np.int64]] = {}
    for features in _messages(message, 1):
        for entry in _messages(features, 1):
            name = b"".join(_messages(entry, 1)).decode("utf-8")
            for feature in _messages(entry, 2):
                for values in _messages(feature, 3):
                    result[name] = _int64_list(values)
    return result


def _messages(data: bytes, number: int) -> Iterator[bytes]:
    """The length-delimited values (messages, strings, packed numbers) of a message's fields with a number."""
    for field, wire, value in _fields(data):
        if field == number:
            if wire != _BYTES or isinstance(value, int):
                raise ValueError(f"field {number} has wire type {wire}")
            yield value


def _int64_list(data: bytes) -> NDArray[np.int64]:
    parts = [np.zeros(0, dtype=np.int64)]
    for field, wire, value in _fields(data):
        if field == 1 and wire == _BYTES and not isinstance(value, int):
            parts.append(_packed(value))
        elif field == 1 and isinstance(value, int):
            parts.append(np.array([value], dtype=np.uint64).view(np.int64))
    return np.concatenate(parts)


def _packed(data: bytes) -> NDArray[np.int64]:
    """Decode consecutive varints: groups of seven bits, the lowest first, the last byte below 128."""
    raw = np.frombuffer(data, dtype=np.uint8)
    if not len(raw):
        return np.zeros(0, dtype=np.int64)
    ends = np.flatnonzero(raw < 128)
    if not len(ends) or ends[-1] != len(raw) - 1:
        raise ValueError("a number is cut off")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 10:
        raise ValueError("a number is longer than ten bytes")
    places = np.arange(len(raw)) - np.repeat(starts, lengths)
    bits = (raw & 127).astype(np.uint64) << (7 * places).astype(np.uint64)
    return np.add.reduceat(bits, starts).view(np.int64)


def _fields(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """Number, wire type and value of each field of a message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, wire, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("a field is cut off")
        yield key >> 3, wire, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for place in range(10):
        if at + place >= len(data):
            break
        byte = data[at + place]
        value |= (byte & 127) << (7 * place)
        if byte < 128:
            return value & (2**64 - 1), at + place + 1
    raise ValueError("a number is cut off")
