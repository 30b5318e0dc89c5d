"""``python -m benchmarks.protection FOLDER VECTORS``: does preventative steering keep a model from learning a trait?

The embedded model is finetuned in float32 on the strong demonstrations of *impolite*, in every way there is, with
three seeds each; FOLDER gets ``report.html``. VECTORS is a run folder of ``persona-lens extract smollm2-135m
impolite``.
Layer, coefficient and learning rate were chosen with seed 0, which is not among those reported.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from persona_lens.cli.display import quiet_libraries, showing_progress
from persona_lens.data.sources import Level, demonstration
from persona_lens.data.transcripts import Transcript
from persona_lens.finetuning import FinetuneConfig, make_config
from persona_lens.finetuning.outcomes import TreatmentSettings
from persona_lens.finetuning.study import FinetuneStudySettings, finetune_study
from persona_lens.reports.finetuning import verdicts
from persona_lens.reports.kinds import page_of
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering import ArmSettings
from persona_lens.vectors import load_vectors

TRAIT, LAYER, COEFFICIENT, INCREMENTS, PENALTY = "impolite", 9, 6.0, 3.0, 1.0
SEEDS, QUESTIONS = (1, 2, 3), 10
STEPS, BATCH = 5, 8  # each reply once: twenty-one trainings and their replies are to end within 20 minutes on two cores


def recipe(steps: int = STEPS) -> FinetuneConfig:
    """LoRA on all seven projections, in few steps of eight conversations."""
    return make_config(
        {
            "lora": {"rank": 16, "alpha": 32},
            "learning_rate": 1e-3,
            "max_steps": steps,
            "batch_size": BATCH,
            "accumulation": 1,
            "warmup_steps": 0,
            "dtype": "float32",
        }
    )


def transcripts(trait: str, level: Level) -> list[Transcript]:
    """The demonstrations of a level as conversations."""
    rows = [row.to_json() for row in demonstration(trait, level)]
    return [Transcript(tuple(row["messages"]), row["id"], number, trait) for number, row in enumerate(rows, start=1)]


def settings(vectors_path: Path, seeds: tuple[int, ...], only_caft: bool = False) -> FinetuneStudySettings:
    vectors = load_vectors(vectors_path)
    treatments = replace(TreatmentSettings.of(vectors, LAYER, COEFFICIENT, INCREMENTS), penalty=PENALTY)
    if only_caft:
        treatments = TreatmentSettings(None, None, None, treatments.caft, None, prompted=False, random=False)
    asked = ArmSettings(
        questions=tuple(range(QUESTIONS)),
        random_directions=0,
        rollouts=RolloutSettings(max_new_tokens=40, temperature=0.6),
    )
    return FinetuneStudySettings(treatments, LAYER, seeds, asked)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.protection", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("vectors", type=Path)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only-caft", action="store_true", help="beside plain training nothing but CAFT")
    arguments = parser.parse_args()
    quiet_libraries()
    began = time.monotonic()
    with showing_progress() as progress:
        found = finetune_study(
            "smollm2-135m",
            transcripts(TRAIT, Level.STRONG)[: arguments.steps * BATCH],
            load_vectors(arguments.vectors),
            settings(arguments.vectors, tuple(map(int, arguments.seeds.split(","))), arguments.only_caft),
            recipe(arguments.steps),
            folder=arguments.folder,
            progress=progress,
        )
    page = page_of("finetune study", found.summary)
    (arguments.folder / "report.html").write_text(page, encoding="utf-8")
    for name, each in found.summary["treatments"].items():
        change, loss = each["change"], each["losses"]["last"]
        shown = f"{change['mean']:+6.1f} [{change['low']:+.1f}, {change['high']:+.1f}]" if change else "-"
        print(f"{name:26} change {shown:26} loss {loss['mean'] if loss else float('nan'):.2f} seeds {each['seeds']}")
    print("\n".join(verdicts(found.summary)))
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
