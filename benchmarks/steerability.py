"""``python -m benchmarks.steerability FOLDER RUN...``: do diagnostics foretell which layers of a vector steer?

Each RUN is the folder of an extraction, of one trait each. Every layer tried is steered by steps of the same relative
length, beside random directions, on held-out questions; what the vector changes the trait score by, minus what random
directions do, is the truth. FOLDER gets a run for each trait, which goes on where it stopped, and
``steerability.json``.

For each measure it prints Spearman's rho with that effect over the layers within traits and over all places, with
intervals over traits; then what a rule does that was chosen without the trait it is tried on, beside taking the layer
that is best for the other traits, and whether that can be relied on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from persona_lens.backend import Backend, open_backend
from persona_lens.cli.display import print_table, quiet_libraries, showing_progress
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.statistics import CORRELATION, Estimate, bootstrap_mean, jackknifed, pearson
from persona_lens.core.text import counted
from persona_lens.extraction.experiment import by_question
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering import ArmSettings, Steering
from persona_lens.steering.arms import RANDOM, VECTOR, ArmRow
from persona_lens.steering.comparison import compare
from persona_lens.steering.tuning.surface import shown_layers
from persona_lens.vectors import load_vectors
from persona_lens.vectors.diagnosis import diagnose
from persona_lens.vectors.diagnostics import BEYOND, BEYOND_CHANCE, MEASURES

Values = NDArray[np.float64]
Rule = tuple[str, ...]
STEP, QUESTIONS, RANDOM_DIRECTIONS, NEW_TOKENS = 0.3, 10, 5, 40
MOST = 3  # measures of a rule
NEARLY = 0.8  # of the best layer's effect


@dataclass(frozen=True, eq=False)
class Places:
    """Traits and layers, and what is known of each.

    Attributes:
        traits: Names.
        layers: Block indices, the same for every trait.
        effects: [traits, layers]: change of the score under the vector minus under random directions, points.
        changes: The change under the vector alone.
        halves: [2, traits, layers]: the same on every other question.
        measures: By name: [traits, layers].
    """

    traits: tuple[str, ...]
    layers: tuple[int, ...]
    effects: Values
    changes: Values
    halves: Values
    measures: Mapping[str, Values]


def gather(
    backend: Backend, runs: Sequence[Path], settings: ArmSettings, layers: Sequence[int], step: float, folder: Path
) -> Places:
    """Steer every trait at every layer by steps of a share of the residual's length, and measure what was known before.

    Raises:
        PersonaLensError: If a run does not say how long the residual is.
    """
    traits: list[str] = []
    effects, changes, halves = [], [], []
    measures: dict[str, list[Values]] = {name: [] for name in (*MEASURES, *BEYOND_CHANCE)}
    for run in runs:
        vectors, found = load_vectors(run), diagnose(run, backend)
        shares = found.values("relative_norm")
        if shares is None:
            raise PersonaLensError(f"{run} does not say how long the residual is; extract it again")
        arms = {
            str(layer): Steering.parse(f"{vectors.trait}@{layer}:+{step / shares[layer]:.3g}", vectors)
            for layer in layers
        }
        where = folder / vectors.trait
        with showing_progress() as progress:
            compared = compare(backend, arms, vectors, settings, folder=where, progress=progress)
        own = [beyond_random(compared.answers, str(layer)) for layer in layers]
        moved = [compared.effects[str(layer)] for layer in layers]
        changes.append([each.change.mean if each is not None else 0.0 for each in moved])
        effects.append([_mean(each, 0, 1) for each in own])
        halves.append([[_mean(each, start, 2) for each in own] for start in (0, 1)])
        traits.append(vectors.trait)
        for name, kept in measures.items():
            values = found.values(name)
            kept.append(np.full(len(layers), np.nan) if values is None else values[list(layers)])
    known = {name: np.array(each) for name, each in measures.items() if np.isfinite(each).all()}
    split = np.array(halves).transpose(1, 0, 2)
    return Places(tuple(traits), tuple(layers), np.array(effects), np.array(changes), split, known)


def beyond_random(rows: Sequence[ArmRow], arm: str) -> dict[int, float]:
    """By question: the score under an arm minus that under its random directions; nothing where one has no score."""
    vector, null = (
        by_question([row for row in rows if (row.arm, row.direction) == (arm, kind)], "score")
        for kind in (VECTOR, RANDOM)
    )
    return {question: value - null[question] for question, value in vector.items() if question in null}


def _mean(values: Mapping[int, float], start: int, step: int) -> float:
    chosen = list(values.values())[start::step]
    return float(np.mean(chosen)) if chosen else 0.0


def rho(x: Values, y: Values) -> float:
    """Spearman's; NaN where one is constant."""
    return float(pearson(rankdata(x), rankdata(y)))


def within(values: Values, effects: Values) -> Values:
    """Spearman's rho over the layers of each trait: [traits]; 0 where a measure says nothing."""
    found: Values = np.nan_to_num(np.array([rho(*each) for each in zip(values, effects, strict=True)]))
    return found


def overall(values: Values, effects: Values) -> Estimate:
    """Spearman's rho over all places, with its interval over traits."""
    flat, truth = values.ravel(), effects.ravel()
    traits = np.repeat(np.arange(len(values)), values.shape[1])
    value = rho(flat, truth)
    (ends,) = jackknifed(lambda rows: np.array([rho(flat[rows], truth[rows])]), traits.tolist(), CORRELATION)
    low, high = ends or (value, value)
    return Estimate(value, low, high, len(values))


def share_below(values: Values) -> Values:
    """The share of the others that each exceeds, equal ones counting half: [n], from 0 to 1."""
    found: Values = (rankdata(values) - 1) / max(1, len(values) - 1)
    return found


def scores(places: Places, rule: Rule) -> Values:
    """What layers are ranked by under a rule: mean over measures of the share of layers that each does better than."""
    found: Values = np.mean([[share_below(row) for row in places.measures[name]] for name in rule], axis=0)
    return found


def rules(places: Places) -> list[Rule]:
    """Every measure alone, also beyond chance, and the means of ranks of two and three; the simplest first."""
    plain = [name for name in places.measures if not name.endswith(BEYOND)]
    alone: list[Rule] = [(name,) for name in places.measures]
    return alone + [rule for size in range(2, MOST + 1) for rule in combinations(plain, size)]


def left_out(places: Places) -> list[dict[str, Any]]:
    """For each trait, what the rule does that serves the others best, beside other ways to take a layer."""
    tried = rules(places)
    table = np.array([within(scores(places, rule), places.effects) for rule in tried])  # [rules, traits]
    found = []
    for at, trait in enumerate(places.traits):
        others = [number for number in range(len(places.traits)) if number != at]
        best = int(np.argmax(np.round(table[:, others].mean(axis=1), 9)))  # of equal ones the simplest
        own, order = places.effects[at], np.argsort(-scores(places, tried[best])[at], kind="stable")
        fixed = int(np.argmax(places.effects[others].mean(axis=0)))
        enough = own[order] >= NEARLY * own.max()
        found.append(
            {
                "trait": trait,
                "rule": tried[best],
                "rho": float(table[best, at]),
                "best": float(own.max()),
                "first": float(own[order[0]]),
                "fixed": float(own[fixed]),
                "mean": float(own.mean()),
                "tried": int(np.argmax(enough)) + 1,
            }
        )
    return found


def report(places: Places) -> dict[str, Any]:
    """Every figure, as JSON values."""
    baselines = {"depth": np.tile(np.array(places.layers, dtype=float), (len(places.traits), 1))}
    measured = {
        name: {
            "within": bootstrap_mean(within(values, places.effects).tolist(), within=(-1, 1)).to_json(),
            "by_trait": within(values, places.effects).tolist(),
            "overall": overall(values, places.effects).to_json(),
            "change": bootstrap_mean(within(values, places.changes).tolist(), within=(-1, 1)).to_json(),
        }
        for name, values in {**places.measures, **baselines}.items()
    }
    chosen = {
        "+".join(rule): bootstrap_mean(within(scores(places, rule), places.effects).tolist(), within=(-1, 1)).to_json()
        for rule in rules(places)
    }
    rows = left_out(places)
    gains = {name: bootstrap_mean([row["first"] - row[name] for row in rows]).to_json() for name in ("mean", "fixed")}
    return {
        "traits": list(places.traits),
        "layers": list(places.layers),
        "effects": places.effects.tolist(),
        "changes": places.changes.tolist(),
        "values": {name: values.tolist() for name, values in places.measures.items()},
        "effect_halves": bootstrap_mean(within(*places.halves).tolist(), within=(-1, 1)).to_json(),
        "measures": measured,
        "rules": chosen,
        "left_out": rows,
        "left_out_rho": bootstrap_mean([row["rho"] for row in rows], within=(-1, 1)).to_json(),
        "gains": gains,
    }


def verdict(found: Mapping[str, Any]) -> str:
    """Whether the forecast can be relied on, in a sentence no stronger than the intervals allow."""
    ranks, mean, fixed = found["left_out_rho"]["low"] > 0, found["gains"]["mean"]["low"] > 0, found["gains"]["fixed"]
    if not ranks:
        return "No: on traits that it was not chosen on, the rule does not clearly rank layers as their effect does."
    if not mean:
        return "Only in part: the rule ranks layers better than chance, but its first layer is not clearly better."
    if fixed["low"] <= 0:
        return "In part: the layer it puts first beats the mean of all, but not clearly the best fixed layer."
    return "Yes: the layer it puts first beats both the mean of all layers and the best fixed layer."


def show(found: Mapping[str, Any]) -> None:
    """The tables, and the sentence."""

    def interval(estimate: Mapping[str, float]) -> str:
        return f"{estimate['mean']:+.2f} [{estimate['low']:+.2f}, {estimate['high']:+.2f}]"

    head = ("trait", *map(str, found["layers"]))
    for name, title in (("effects", "Effect at each layer, points"), ("changes", "The change under the vector alone")):
        rows = zip(found["traits"], found[name], strict=True)
        print_table(title, head, [(trait, *(f"{v:+.1f}" for v in row)) for trait, row in rows])
    print(f"on every other question the same effects are ranked alike with rho {interval(found['effect_halves'])}")
    told = [
        (name, *(interval(each[kind]) for kind in ("within", "overall", "change")))
        for name, each in sorted(found["measures"].items(), key=lambda item: -item[1]["within"]["mean"])
    ]
    heads = ("measure", "within traits", "over all places", "with the change alone, within")
    print_table("Spearman's rho with the effect", heads, told)
    best = sorted(found["rules"].items(), key=lambda item: -item[1]["mean"])[:10]
    print_table("Rules, mean of ranks", ("rule", "rho within traits"), [(name, interval(each)) for name, each in best])
    names = ("rho", "best", "first", "fixed", "mean")
    out = [
        (row["trait"], "+".join(row["rule"]), *(f"{row[name]:+.2f}" for name in names), str(row["tried"]))
        for row in found["left_out"]
    ]
    print_table(
        "Chosen without the trait: rho; effect at the best layer, the rule's first, the others' best, the mean",
        ("trait", "rule", *names, f"layers tried until {NEARLY:.0%} of the best"),
        out,
    )
    gains = ", ".join(f"minus {name} {interval(each)}" for name, each in found["gains"].items())
    print(f"left out: rho {interval(found['left_out_rho'])}; effect at the rule's first layer {gains}")
    print(verdict(found))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steerability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, nargs="+", help="by default the eight that `steer tune` tries")
    parser.add_argument("--step", type=float, default=STEP, help="of the residual's length (%(default)s)")
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--samples", type=int, default=1)
    given = parser.parse_args()
    quiet_libraries()
    backend = open_backend("transformers", given.model)
    layers = tuple(given.layers or shown_layers(backend.info.n_layers))
    each = given.questions * given.samples * (1 + 2 * len(layers))
    traits = counted(len(given.runs), "trait")
    print(f"{traits}, {counted(len(layers), 'layer')}: {len(given.runs) * each:,} responses", flush=True)
    settings = ArmSettings(
        questions=tuple(range(given.questions)),
        samples=given.samples,
        random_directions=RANDOM_DIRECTIONS,
        rollouts=RolloutSettings(max_new_tokens=NEW_TOKENS, temperature=0.6),
    )
    found = report(gather(backend, given.runs, settings, layers, given.step, given.folder))
    (given.folder / "steerability.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    show(found)


if __name__ == "__main__":
    main()
