"""``python -m benchmarks.forecasts FOLDER VECTORS...``: does a dataset's dP rank what finetuning on it will shift?

For each trait whose vectors are given, and for the normal, mild and strong demonstrations of it: the projection
difference before training (method, section 7), then the shift and the change of the trait score after plain finetuning
(method, section 6), at three layers, all on the embedded model. It ends with exit code 1 unless both rank the three
levels alike everywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.protection import STEPS, recipe, transcripts
from persona_lens.backend import Backend, open_backend
from persona_lens.cli.display import quiet_libraries
from persona_lens.data.datasets import open_dataset
from persona_lens.data.sources import Level
from persona_lens.finetuning import finetune
from persona_lens.finetuning.shift import ShiftSettings, shift
from persona_lens.models import load
from persona_lens.monitoring import Panel
from persona_lens.runs.settings import RolloutSettings
from persona_lens.screening import BaseResponses, ScreeningSettings, screen
from persona_lens.steering import ArmSettings
from persona_lens.vectors import PersonaVectors, load_vectors

LAYERS, NEW_TOKENS = (14, 18, 22), 40


def projection_differences(backend: Backend, vectors: PersonaVectors, folder: Path) -> dict[str, list[float]]:
    """DP of each level at each layer: its replies against the base model's own greedy ones to the same prompts."""
    settings = ScreeningSettings(base=BaseResponses.GENERATE, max_new_tokens=NEW_TOKENS)
    data = open_dataset(f"demonstration:{vectors.trait}", by="level")
    found = screen(backend, [data], Panel.of(vectors, LAYERS), settings, folder=folder)
    groups = found.summary["datasets"][0]["groups"]
    gauges = [f"{vectors.trait}@{layer}" for layer in LAYERS]
    return {level: [group["means"][gauge]["difference"]["mean"] for gauge in gauges] for level, group in groups.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forecasts", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("vectors", type=Path, nargs="+")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    quiet_libraries()
    base, loaded = open_backend("transformers", "smollm2-135m"), load("smollm2-135m", dtype="float32")
    asked = ArmSettings(questions=tuple(range(16)), random_directions=0, rollouts=RolloutSettings(NEW_TOKENS, 0.6))
    results: dict[str, Any] = {}
    for path in arguments.vectors:
        vectors = load_vectors(path)
        dp = projection_differences(base, vectors, arguments.folder / f"{vectors.trait}-screened")
        opening = {}
        for level in Level:
            data = transcripts(vectors.trait, level)
            folder = arguments.folder / f"{vectors.trait}-{level}"
            finetune(loaded, data, folder, recipe(arguments.steps))
            opening[level.value] = lambda folder=folder: open_backend("transformers", str(folder))
        settings = ShiftSettings(LAYERS, asked=asked)
        where = arguments.folder / f"{vectors.trait}-shift"
        found = shift(base, opening, [vectors], settings, folder=where).summary["traits"][vectors.trait]
        rows = {
            level: {"dP": dp[level], "shift": [at["mean"] for at in each["shift"]], "change": each["change"]["mean"]}
            for level, each in found["models"].items()
        }
        results[vectors.trait] = rows
        for level, row in rows.items():
            of_layers = (
                f"layer {layer}: dP {before:+.2f}, shift {after:+.2f}"
                for layer, before, after in zip(LAYERS, row["dP"], row["shift"], strict=True)
            )
            print(f"{vectors.trait} {level}: {'; '.join(of_layers)}; score {row['change']:+.1f}", flush=True)
    (arguments.folder / "forecasts.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    alike = {
        f"{trait}@{layer}": ranked(rows, "dP", place) == ranked(rows, "shift", place)
        for trait, rows in results.items()
        for place, layer in enumerate(LAYERS)
    }
    print(f"dP ranks the levels as the shift does at {', '.join(name for name, same in alike.items() if same)}")
    print(f"and otherwise at {', '.join(name for name, same in alike.items() if not same) or 'none'}")
    return 0 if all(alike.values()) else 1


def ranked(rows: dict[str, dict[str, Any]], by: str, place: int) -> list[str]:
    return sorted(rows, key=lambda level: rows[level][by][place])


if __name__ == "__main__":
    sys.exit(main())
