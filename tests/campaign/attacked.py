"""`Target`: a reader or parser of the project, and how its inputs are made of valid examples."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.campaign.mutations import damaged, distorted


@dataclass(frozen=True)
class Target:
    """What is attacked.

    Attributes:
        name: What it reads.
        make: Makes an input.
        read: Reads it, as the commands do.
        share: Of all inputs, in parts.
    """

    name: str
    make: Callable[[random.Random], bytes]
    read: Callable[[bytes], object]
    share: float = 1.0


def from_bytes(examples: Sequence[bytes]) -> Callable[[random.Random], bytes]:
    return lambda rng: damaged(rng, examples)


def from_json(value: Any) -> Callable[[random.Random], bytes]:
    """Half of the inputs are damaged bytes, half are whole JSON with values that do not belong there."""
    example = json.dumps(value).encode()
    return lambda rng: damaged(rng, [example]) if rng.random() < 0.4 else json.dumps(distorted(rng, value)).encode()


def from_rows(rows: Sequence[Any]) -> Callable[[random.Random], bytes]:
    def write(rows: Any) -> bytes:
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return damaged(rng, [write(rows)])
        made = distorted(rng, list(rows))
        return write(made) if isinstance(made, list) else json.dumps(made).encode()

    return make


def in_file(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def read_it(content: bytes) -> object:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return read(path)

    return read_it
