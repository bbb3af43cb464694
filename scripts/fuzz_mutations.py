"""What `fuzz.py` does to a sound file: bytes flipped, cut, doubled; JSON values of other types, keys gone, renamed or
written twice, numbers without end, nesting without end; a safetensors header whose length lies.

Everything is drawn from the `random.Random` that is handed in, so that a seed gives the same bytes again.
"""

from __future__ import annotations

import copy
import json
import struct
from random import Random
from typing import Any

# Written as text, because Python would not write such a number.
_LONG = {"@digits": "9" * 5000, "@huge": "1" + "0" * 400, "@deep": "[" * 100_000 + "]" * 100_000, "@nan": "NaN"}
_LONG |= {"@infinity": "-Infinity", "@exponent": "1e999", "@twenty": "1" + "0" * 20}
_SCALARS: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    64,
    255,
    2**31,
    2**63,
    -(2**63),
    0.0,
    -0.5,
    1.5,
    1e308,
    1e-320,
]
_SCALARS += [
    "",
    "x",
    " ",
    "nf4",
    "auto",
    "no",
    "../x",
    "/etc/passwd",
    "\x00",
    "\ud800",
    "é" * 40,
    "a" * 5000,
    "1",
    "1e-4",
]
_SCALARS += [[], {}, [1], ["x"], [None], {"x": 1}, [[1]], {"": {}}, [{}], ["q_proj"], [1, "x"], {"content": 1}]
_SCALARS += list(_LONG)
_ODD = [
    b"",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\x00",
    b"{}",
    b"[]",
    b"null",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"9" * 5000,
]


def scalar(rng: Random) -> Any:
    return copy.deepcopy(rng.choice(_SCALARS))


def bytes_of(rng: Random, raw: bytes, *, within: int | None = None) -> bytes:
    """`raw` with one to four things done to its first `within` bytes."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4))):
        end = min(len(data), within or len(data))
        if not end:
            break
        at, length = rng.randrange(end), rng.choice((1, 2, 8, 64, 1000))
        what = rng.randrange(8)
        if what == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            data[at] = rng.choice((0, 0xFF, 0x7F, 0x80, 0x22, 0x5B, 0x7B, 0x2C, 0x3A, rng.randrange(256)))
        elif what == 2:
            del data[at:]
        elif what == 3:
            del data[at : at + length]
        elif what == 4:
            data[at:at] = data[at : at + length]
        elif what == 5:
            data[at : at + length] = rng.randbytes(len(data[at : at + length]))
        elif what == 6:
            data[at : at + length] = bytes(len(data[at : at + length]))
        else:
            data[at:at] = rng.choice((b"[" * 1000, b"9" * 5000, b'"', b"\\ud800", b",", b"\xff", b"\r", b"NaN"))
    return bytes(data)


def value_of(rng: Random, value: Any) -> Any:
    """A copy of a JSON value with one to three of its places changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        holders = list(_holders(value))
        if not holders:
            return scalar(rng)
        holder = rng.choice(holders)
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key: Any = rng.choice(keys)
        what = rng.randrange(10)
        if what < 6:
            holder[key] = scalar(rng)
        elif what == 6:
            del holder[key]
        elif what == 7 and isinstance(holder, dict):
            holder[str(key) + rng.choice(("_", "s", "\x00", " "))] = holder.pop(key)
        elif what == 8 and isinstance(holder, dict):
            holder[rng.choice(("x", "", "self", "cls", "name", "type", "__class__", "kwargs"))] = scalar(rng)
        else:
            other = rng.choice(holders)
            holder[key] = copy.deepcopy(rng.choice(list(other.values() if isinstance(other, dict) else other)))
    return value


def text_of(rng: Random, value: Any) -> bytes:
    """A value as JSON text, with what only text can say: numbers and nesting without end, a key written twice."""
    text = json.dumps(value)
    for mark, written in _LONG.items():
        text = text.replace(f'"{mark}"', written)
    if rng.random() < 0.03 and '": ' in text:
        text = text.replace("{", '{"model_type": 1, "model_type": 2, ', 1)
    return text.encode("utf-8")


def json_of(rng: Random, raw: bytes) -> bytes:
    """A JSON file, changed in its values, in its bytes, or altogether."""
    draw = rng.random()
    if draw < 0.04:
        return rng.choice(_ODD)
    if draw < 0.2:
        return bytes_of(rng, raw)
    text = text_of(rng, value_of(rng, json.loads(raw)))
    return bytes_of(rng, text) if draw > 0.95 else text


def safetensors_of(rng: Random, raw: bytes) -> bytes:
    """A safetensors file with a changed header: its length, its JSON or its bytes; or one cut short."""
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = raw[8 : 8 + length], raw[8 + length :]
    draw = rng.random()
    if draw < 0.15:
        lie = rng.choice((0, 1, length - 1, length + 1, length * 2, 2**31, 2**63, 2**64 - 1, 100_000_001, len(raw)))
        return struct.pack("<Q", lie) + header + data
    if draw < 0.3:
        return bytes_of(rng, raw, within=length + 200)
    if draw < 0.6:
        # Of the same length, so that the tensors stay in place.
        changed = bytes_of(rng, header)[:length].ljust(length)
        return struct.pack("<Q", length) + changed + data
    changed = text_of(rng, value_of(rng, json.loads(header))) if draw < 0.97 else rng.choice(_ODD)
    return struct.pack("<Q", len(changed)) + changed + data


def _holders(value: Any) -> Any:
    if isinstance(value, dict | list):
        if value:
            yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _holders(item)
