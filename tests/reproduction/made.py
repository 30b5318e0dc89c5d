"""Figures as steps would leave them, made up so that what claims come to is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from persona_lens.reproduction import Reproduction, read_plan, reproduce

TRAITS = ("impolite", "optimistic")
LEVELS = ("normal", "mild", "strong")


def number(mean: float, reach: float = 1.0, n: int = 12) -> dict[str, Any]:
    """An estimate with an interval of this reach to either side."""
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "n": n}


def value(mean: float | None, reach: float = 0.1) -> dict[str, Any]:
    """A correlation, or none."""
    return {
        "value": mean,
        "low": None if mean is None else mean - reach,
        "high": None if mean is None else mean + reach,
    }


def beside(mean: float, random: float, reach: float = 1.0, name: str = "vector") -> dict[str, Any]:
    """A change beside random directions."""
    return {name: number(mean, reach), "random": number(random, reach), "difference": number(mean - random, reach)}


def arm(change: float, random: float | None = 0.0, nll: float = 1.2) -> dict[str, Any]:
    """An arm of a comparison."""
    told = beside(change, random or 0.0, name="change")
    if random is None:
        told |= {"random": None, "difference": None}
    return {"effect": {"score": number(50 + change), **told, "nll": number(nll, 0.05), "coherence": None, "empty": 0.0}}


def tune(layer: int = 2) -> dict[str, Any]:
    """Tuning."""
    chosen = {"steering": f"impolite@{layer}:+2", "layer": layer}
    return {"chosen": chosen, "residual_norms": [1.0] * 4, "confirmed": beside(40, 2, name="change")}


def curve(rise: float) -> list[dict[str, Any]]:
    """A curve that rises by so much from one end to the other."""
    return [{"coefficient": at, "score": number(50 + rise * at / 2), "nll": number(1.2), "coherence": None}
            for at in (-1.0, 0.0, 1.0)]  # fmt: skip


def sweep(up: float = 30, down: float = -20) -> dict[str, Any]:
    """A sweep of two layers."""
    effect = {
        **beside(up - down, 1),
        "low": -1.0,
        "high": 1.0,
        "promotion": beside(up, 1),
        "suppression": beside(down, 1),
    }
    layers = [{"layer": at, "effect": effect, "curves": {"vector": curve(40), "random": curve(2)}} for at in (1, 2)]
    return {"layers": layers, "chosen": 2}


def cliff() -> dict[str, Any]:
    """Steps below and beyond the length of the residual."""
    arms = {"impolite@2:+15%": arm(20, None), "impolite@2:+115%": arm(30, None, nll=5.0)}
    prompted = {"system": "Be rude.", **arm(25, None)}
    return {"unsteered": {"score": number(10), "nll": number(1.0, 0.05)}, "arms": {**arms, "prompted": prompted}}


def study(whole: float = 0.75, within: float = 0.1) -> dict[str, Any]:
    """A monitoring study of both kinds of conditions."""
    null = {"mean": 0.0, "low": -0.3, "high": 0.3, "n": 20}
    rows = [{"layer": at, "pearson": value(r), "within_pearson": value(within), "null": null, "within_null": null}
            for at, r in ((1, 0.2), (2, whole))]  # fmt: skip
    return {"groups": {kind: {"layers": rows, "prompts": 24, "best_null": null} for kind in ("prompts", "shots")}}


def shift(slope: float = 1.0) -> dict[str, Any]:
    """Six finetuned models, whose score changes with the shift."""
    models, at = {}, 0
    for trait in TRAITS:
        for level in LEVELS:
            at += 1
            models[f"finetune-{level}-{trait}"] = {
                "shift": [number(at + 0.1 * (at % 2))],
                "change": number(10 * slope * at, 2),
            }
    return {"layers": [2], "traits": {trait: {"models": models} for trait in TRAITS}}


def screen(trait: str) -> dict[str, Any]:
    """Data of three levels, whose dP goes with the shift and whose raw projection does not."""
    first = 3 * TRAITS.index(trait)
    means = {
        f"demonstration:{trait}/{level}": {
            f"{each}@2": {
                "raw": number((-1.0) ** at),
                "difference": number(first + at),
                "prompt_difference": number(first + at + 0.2 * (at % 2)),
            }
            for each in TRAITS
        }
        for at, level in enumerate(LEVELS)
    }
    auc = {"auc": 0.97, "low": 0.93, "high": 0.99, "labelled": 20, "clean": 20, "random": [0.4, 0.5, 0.6]}
    labels = {quantity: {f"{trait}@2": auc} for quantity in ("raw", "difference")}
    return {"datasets": [{"name": name, "means": each} for name, each in means.items()],
            "labels": {"labels": {"strong": labels}}}  # fmt: skip


def protection() -> dict[str, Any]:
    """Ways to finetune: preventative steering holds back, the penalty does not."""
    beside_plain = {"post-hoc": -30.0, "preventative": -55.0, "preventative, all layers": -80.0, "caft": -20.0,
                    "regularised": 0.5, "prompted": -3.0, "random": -1.0}  # fmt: skip
    found: dict[str, Any] = {
        name: {"change": number(80 + each), "against_plain": number(each, 5), "against_random": number(each + 1, 5),
               "capability_change": number(-0.2 if name == "post-hoc" else 0.0, 0.05)}
        for name, each in beside_plain.items()
    }  # fmt: skip
    found["plain"] = {"change": number(80, 5), "against_plain": None, "against_random": None, "capability_change": None}
    return {"treatments": found, "settings": {"task": "basics"}}


PLAN = """
scale: made
traits: [impolite, optimistic]
steps:
  tune: tune {trait}
  sweep: sweep {tune}
  cliff: cliff {tune}
  study: study {trait}
  shift: shift {tune}
  screen: screen {trait} {tune.all}
  broken: broken {trait}
"""


def execute(words: Sequence[str]) -> Any:
    """Carries out the commands of `PLAN`, whose figures are made up."""
    makers: dict[str, Callable[[], Any]] = {
        "tune": tune,
        "sweep": sweep,
        "cliff": cliff,
        "study": study,
        "shift": shift,
    }
    return screen(words[1]) if words[0] == "screen" else makers[words[0]]()


def reproduced(folder: Path) -> Reproduction:
    """A reproduction of made-up figures."""
    plan = folder.parent / "plan.yaml"
    plan.write_text(PLAN)
    return reproduce(read_plan(plan), "a-model", execute, folder)
