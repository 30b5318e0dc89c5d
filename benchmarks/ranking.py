"""``python -m benchmarks.ranking``: a large dictionary, ranked on a small machine.

A file of 131,072 directions of width 3,584, as the paper's autoencoder has them, is written; then the cosine of every
direction with a vector and twenty random directions is taken, in a process of its own whose time and peak memory are
measured. Exit code 1 if it takes more than 10 seconds or 2 GB.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.memory import peak_bytes
from persona_lens.analysis.dissection.decomposition import decoder_cosines, rank
from persona_lens.analysis.dissection.features import FileDecoder
from persona_lens.vectors import random_directions

FEATURES, WIDTH = 131_072, 3_584
SECONDS, BYTES = 10.0, 2_000_000_000
BYTES_EACH = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}
ROWS = 4096  # written at once


def write(file: Path, dtype: str) -> None:
    """A safetensors file of random directions, never whole in memory."""
    name, size = BYTES_EACH[dtype]
    header = json.dumps(
        {"W_dec": {"dtype": name, "shape": [FEATURES, WIDTH], "data_offsets": [0, FEATURES * WIDTH * size]}}
    )
    padded = header.encode().ljust(-(-len(header) // 8) * 8)
    generator = np.random.default_rng(0)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(padded)) + padded)
        for _ in range(0, FEATURES, ROWS):
            rows = torch.from_numpy(generator.standard_normal((ROWS, WIDTH), dtype=np.float32))
            stream.write(
                rows.numpy().tobytes() if dtype == "float32" else rows.bfloat16().view(torch.int16).numpy().tobytes()
            )


def measure(file: Path) -> dict[str, float]:
    """Rank them, in this process."""
    directions = random_directions(WIDTH, 21, seed=1)
    started = time.perf_counter()
    cosines = decoder_cosines(FileDecoder(file), directions)
    rank(cosines[0], 20, cosines[1:])
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_bytes": peak_bytes()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="rank this file instead, and print what that took")
    given = parser.parse_args()
    if given.file:
        print(json.dumps(measure(given.file)))
        return 0
    failed = False
    for dtype in BYTES_EACH:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "sae_weights.safetensors"
            write(file, dtype)
            command = [sys.executable, "-m", "benchmarks.ranking", "--file", str(file)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        holds = found["seconds"] < SECONDS and found["peak_bytes"] < BYTES
        failed |= not holds
        print(
            f"{FEATURES:,} features x {WIDTH:,} in {dtype}: {found['seconds']:.1f} s of {SECONDS:g}, "
            f"{found['peak_bytes'] / 1e9:.2f} GB of {BYTES / 1e9:g}{'' if holds else ': TOO MUCH'}"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
