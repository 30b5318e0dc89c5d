"""``python -m benchmarks.orderings VECTORS --out DIR``: two orderings that the paper reports, tried on one model.

1. The response mean steers better than the prompt mean and the last prompt token, at steps of equal length
   (the paper's figure 11).
2. Increments at all layers cost less capability than the whole vector at one layer, at equal effect.

Writes ``orderings.json`` with every figure. What it finds on the embedded model stands in docs/steering.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from persona_lens.analysis.capability import evaluate_capability
from persona_lens.analysis.capability.evaluation import BUILTIN_TASK
from persona_lens.backend import Backend, open_backend
from persona_lens.cli.display import showing_progress
from persona_lens.core.statistics import Estimate, bootstrap_mean
from persona_lens.extraction.experiment import by_question
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering import ArmSettings, Steering
from persona_lens.steering.arms import ArmRow
from persona_lens.steering.comparison import Comparison, compare
from persona_lens.vectors import PersonaVectors, load_vectors

REDUCTIONS = ("response_mean", "prompt_mean", "prompt_last")
PUSHES = (0.5, 1.0)  # shares of the tuned step, in percent of the residual's length the same for every reduction
# Of the tuned coefficient: what is added at every layer adds up, and does as much with far less.
SHARES = {"one layer": (0.25, 0.5, 1.0), "all layers": (0.03, 0.06, 0.12, 0.25)}


def reductions(backend: Backend, vectors: PersonaVectors, settings: ArmSettings, folder: Path) -> dict[str, Any]:
    """Effect of each reduction at each push, and of pairs of reductions question by question."""
    layer, tuned = vectors.tuned_choice().layer, vectors.provenance["tuned"]["strength"]
    pushes = [round(100 * share * tuned) for share in PUSHES]
    arms = {
        f"{name} {push}%": Steering.parse(f"{vectors.trait}.{name}@{layer}:+{push}%", vectors)
        for name in REDUCTIONS
        for push in pushes
    }
    with showing_progress() as progress:
        found = compare(backend, arms, vectors, settings, folder=folder, progress=progress)
    differences = {
        f"response_mean minus {other} at {push}%": _paired(found.answers, f"response_mean {push}%", f"{other} {push}%")
        for other in REDUCTIONS[1:]
        for push in pushes
    }
    named = {name: estimate.to_json() if estimate else None for name, estimate in differences.items()}
    return {"layer": layer, "pushes": pushes, **found.summary, "differences": named}


def increments(backend: Backend, vectors: PersonaVectors, settings: ArmSettings, folder: Path) -> dict[str, Any]:
    """Surprise and capability of both ways of steering, at the strengths where their effects are equal."""
    layer, tuned = vectors.tuned_choice().layer, vectors.tuned_choice().coefficient
    written = {
        "one layer": f"{vectors.trait}@{layer}:+{{:.3g}}",
        "all layers": f"{vectors.trait}@all:increments(+{{:.3g}})",
    }
    ways = {
        way: {share * tuned: Steering.parse(written[way].format(share * tuned), vectors) for share in SHARES[way]}
        for way in written
    }
    arms = {f"{way} {c:g}": steering for way, each in ways.items() for c, steering in each.items()}
    with showing_progress() as progress:
        found = compare(backend, arms, vectors, settings, folder=folder, progress=progress)
    equal = _equal_effect(found, ways)
    matched = {way: Steering.parse(written[way].format(c), vectors) for way, c in equal["coefficients"].items()}
    return {
        "layer": layer,
        **found.summary,
        "equal_effect": equal,
        "matched": _matched(backend, matched, vectors, settings, folder.with_name(folder.name + "-matched")),
    }


def _equal_effect(found: Comparison, ways: Mapping[str, Mapping[float, Steering]]) -> dict[str, Any]:
    """The largest change that both ways reach on their rising part, and the coefficients that give 80% of it."""
    curves = {}
    for way, arms in ways.items():
        points = [(c, effect.change.mean) for c in arms if (effect := found.effects[f"{way} {c:g}"]) is not None]
        rising = [(0.0, 0.0)]
        for coefficient, change in points:
            if change > rising[-1][1]:
                rising.append((coefficient, change))
            else:
                break
        curves[way] = rising
    target = 0.8 * min(curve[-1][1] for curve in curves.values())
    return {"change": target, "coefficients": {way: _where(curve, target) for way, curve in curves.items()}}


def _where(curve: Sequence[tuple[float, float]], change: float) -> float:
    """The coefficient at which a rising curve reaches a change."""
    for (c0, y0), (c1, y1) in pairwise(curve):
        if y0 <= change <= y1:
            return float(np.interp(change, [y0, y1], [c0, c1]))
    return curve[-1][0]


def _matched(
    backend: Backend, arms: Mapping[str, Steering], vectors: PersonaVectors, settings: ArmSettings, folder: Path
) -> dict[str, Any]:
    """Score, surprise and capability of both ways at equal effect, and of the unsteered model."""
    beside = replace(settings, random_directions=3)
    with showing_progress() as progress:
        found = compare(backend, arms, vectors, beside, folder=folder, progress=progress)
    accuracy: dict[str, list[float]] = {}
    for name, steering in {"unsteered": None, **arms}.items():
        result = evaluate_capability(backend, edits=steering.edits() if steering else ())
        accuracy[name] = list(result[BUILTIN_TASK].metric("acc").scores)
    cost = {
        name: bootstrap_mean([a - b for a, b in zip(scores, accuracy["unsteered"], strict=True)]).to_json()
        for name, scores in accuracy.items()
        if name != "unsteered"
    }
    gained = [a - b for a, b in zip(accuracy["all layers"], accuracy["one layer"], strict=True)]
    return {
        **found.summary,
        "accuracy": {name: bootstrap_mean(scores).to_json() for name, scores in accuracy.items()},
        "accuracy_change": cost,
        "accuracy_all_layers_minus_one": bootstrap_mean(gained).to_json(),
        "score_all_layers_minus_one": _json(_paired(found.answers, "all layers", "one layer")),
        "surprise_all_layers_minus_one": _json(_paired(found.answers, "all layers", "one layer", "nll")),
    }


def _paired(rows: Sequence[ArmRow], first: str, second: str, quantity: str = "score") -> Estimate | None:
    own = {
        arm: by_question([row for row in rows if row.arm == arm and row.direction == "vector"], quantity)
        for arm in (first, second)
    }
    both = [value - own[second][question] for question, value in own[first].items() if question in own[second]]
    return bootstrap_mean(both) if both else None


def _json(estimate: Estimate | None) -> dict[str, Any] | None:
    return estimate.to_json() if estimate else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orderings", description=__doc__)
    parser.add_argument("vectors", type=Path, help="vectors that `steer tune` wrote")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--samples", type=int, default=1)
    arguments = parser.parse_args()
    vectors, backend = load_vectors(arguments.vectors), open_backend("transformers", arguments.model)
    settings = ArmSettings(
        questions=tuple(range(arguments.questions)),
        samples=arguments.samples,
        random_directions=0,  # three for the steerings that are compared at equal effect
        rollouts=RolloutSettings(max_new_tokens=40, temperature=0.6),
    )
    results: dict[str, Any] = {
        "vectors": vectors.content_hash,
        "reductions": reductions(backend, vectors, settings, arguments.out / "reductions"),
        "increments": increments(backend, vectors, settings, arguments.out / "increments"),
    }
    (arguments.out / "orderings.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for name, estimate in results["reductions"]["differences"].items():
        print(f"{name}: {estimate}")
    print(json.dumps(results["increments"]["matched"], indent=2))


if __name__ == "__main__":
    main()
