"""Inputs that somebody hostile, or a failing disk, would make of valid ones."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

TOKENS = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\x1b[31m", b"\x1b]0;x\x07", b"[/x]", b"\\ud800",
    b"\\u0000",
    b"&a [*a, *a]", b"*a", b"<<: *a", b"!!int ''", b"!!timestamp x", b"!!python/object:x", b"2001-99-99", b"0x_",
    b"0b_",
    b"1:99999999", b"99999999999999999999999999", b"1e999", b"-1", b"NaN", b"Infinity", b".inf", b".nan", b"null", b"~",
    b"true", b"[" * 3000, b"{" * 3000, b'{"a":' * 1500, b"- " * 2000, b'"', b"'", b"\n", b"\r", b"\t", b",", b":", b"@",
    b"0-99999999999", b"[99999999999999999999999999999999:]", b"#", b"|", b">", b"%", b"?", b"..", b"/",
    b"\xe2\x80\xae",
    b"9" * 5000, b"a" * 20000,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "\x1b[31m", "\ud800", "\u202e", "a\x00b", "9" * 5000, "x" * 20000, [], {}, [[]], [None], {"": None}, [{}], [0, "x"],
    "2001-99-99", {"layer": "x"}, {"slope": []}, [1e308, 1e308],
)  # fmt: skip


def deep(levels: int = 400) -> Any:
    """Lists in lists."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def damaged(rng: random.Random, examples: Sequence[bytes]) -> bytes:
    """One of the examples after one to four mishaps."""
    content = rng.choice(examples)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        content = _mishap(rng, content, examples)
    return content


def _mishap(rng: random.Random, content: bytes, examples: Sequence[bytes]) -> bytes:
    size = len(content)
    a, b = sorted((rng.randrange(size + 1), rng.randrange(size + 1)))
    kind = rng.randrange(9)
    if kind == 0 and size:  # flipped bits
        flipped = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            flipped[rng.randrange(size)] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 1:  # cut off
        return content[:a]
    if kind == 2:  # something is missing
        return content[:a] + content[min(b, a + 64) :]
    if kind == 3:  # something stands twice
        return content[:b] + content[a:]
    if kind in (4, 5):  # something is put in
        return content[:a] + rng.choice(TOKENS) + content[a:]
    if kind == 6:  # put in the place of something
        return content[:a] + rng.choice(TOKENS) + content[min(b, a + 16) :]
    if kind == 7:  # the end of another
        other = rng.choice(examples)
        return content[:a] + other[rng.randrange(len(other) + 1) :]
    return rng.randbytes(rng.randrange(64)) if rng.random() < 0.1 else content[a:b] + content[:a]


def distorted(rng: random.Random, value: Any) -> Any:
    """A JSON value with one to three of its values replaced, removed, renamed or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _distorted(rng, value)
    return value


def _distorted(rng: random.Random, value: Any) -> Any:
    inner = [*value] if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not inner or rng.random() < 0.1:
        return deep() if rng.random() < 0.02 else copy.deepcopy(rng.choice(VALUES))
    key = rng.choice(inner)
    kind = rng.randrange(10)
    if kind == 0:
        del value[key]
    elif kind == 1 and isinstance(value, dict):
        value[str(rng.choice(VALUES))[:99]] = value.pop(key)
    elif kind == 2 and isinstance(value, list):
        value.append(value[key])
    else:
        value[key] = _distorted(rng, value[key])
    return value


def joined(rng: random.Random, words: Sequence[str], most: int = 24) -> str:
    """Words of a grammar in any order."""
    return "".join(rng.choice(words) for _ in range(rng.randrange(most)))
