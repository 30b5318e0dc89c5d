"""`check_bounds`: whether what a GGUF file claims to hold fits into the file.

The ``gguf`` package believes every length and count that it reads, makes an object of each entry of an array, and reads
nothing, endlessly, behind the end of a file. So the header is walked first, each length held against what is left.
"""

from __future__ import annotations

import struct
from pathlib import Path

from persona_lens.exchange.errors import ExchangeError

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes, by the type of a value
STRING, ARRAY = 8, 9
MAX_FILE = 2**28
MAX_ENTRIES = 4096
MAX_VALUES = 2**18  # of all arrays together
MAX_DIMENSIONS = 4


class _Walk:
    """A place in a file, moved on only within it."""

    def __init__(self, file: Path, content: bytes) -> None:
        self.file, self.content, self.at = file, content, 4
        self.values = 0

    def skip(self, size: int) -> None:
        if size > len(self.content) - self.at:
            raise ExchangeError(
                f"{self.file} claims {size:,} bytes at byte {self.at:,} and has {len(self.content) - self.at:,} left: "
                "it is damaged or cut short"
            )
        self.at += size

    def number(self, size: int) -> int:
        start = self.at
        self.skip(size)
        return int(struct.unpack_from("<I" if size == 4 else "<Q", self.content, start)[0])

    def count(self, what: str, size: int = 8) -> int:
        found = self.number(size)
        if found > MAX_ENTRIES:
            raise ExchangeError(f"{self.file} claims {found:,} {what}; a control vector has at most {MAX_ENTRIES:,}")
        return found

    def value(self, kind: int) -> None:
        self.values += 1
        if self.values > MAX_VALUES:
            raise ExchangeError(f"{self.file} has over {MAX_VALUES:,} values; a control vector has a few")
        if kind == STRING:
            self.skip(self.number(8))
        elif kind in SIZES:
            self.skip(SIZES[kind])
        elif kind == ARRAY:
            inner = self.number(4)
            if inner == ARRAY:
                raise ExchangeError(f"{self.file} has arrays of arrays; a control vector has none")
            for _ in range(self.count("entries of an array")):
                self.value(inner)
        else:
            raise ExchangeError(f"{self.file} has a value of the unknown type {kind}: it is damaged")


def check_bounds(file: Path) -> None:
    """Raise unless everything that the header of a GGUF file announces is in the file.

    Raises:
        ExchangeError: Saying what is not.
    """
    if file.stat().st_size > MAX_FILE:
        raise ExchangeError(f"{file} is {file.stat().st_size / 1e9:.1f} GB; a control vector is not so large")
    walk = _Walk(file, file.read_bytes())
    version = walk.number(4)
    if version not in (2, 3):
        raise ExchangeError(f"{file} is GGUF version {version} (or of another byte order); versions 2 and 3 are read")
    tensors, values = walk.count("tensors"), walk.count("values")
    for _ in range(values):
        walk.skip(walk.number(8))
        walk.value(walk.number(4))
    for _ in range(tensors):
        walk.skip(walk.number(8))
        dimensions = walk.number(4)
        if dimensions > MAX_DIMENSIONS:
            raise ExchangeError(f"{file} has a tensor of {dimensions:,} dimensions: it is damaged")
        elements = 1
        for _ in range(dimensions):
            elements *= walk.number(8)
        walk.skip(4)
        start = walk.number(8)
        if elements + start > len(walk.content):
            raise ExchangeError(
                f"{file} announces a tensor of {elements:,} numbers at byte {start:,} of its data, which is more than "
                "the file holds: it is damaged or cut short"
            )
