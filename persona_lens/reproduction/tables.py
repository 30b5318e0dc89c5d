"""`CLAIMS`: every quantitative claim of the paper, by the tables of the report; and what its figures are drawn of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from persona_lens.core.documents import plain
from persona_lens.reproduction import readings
from persona_lens.reproduction.claims import Claim, Found, MissingError, Rule

TABLES: Mapping[str, str] = {
    "extraction": "Extraction, and the choice of a layer",
    "steering": "Steering, by layer and coefficient",
    "cliff": "Where text breaks",
    "reductions": "Response mean, prompt mean and last prompt token",
    "judges": "Agreement of judges",
    "monitoring": "Monitoring prompts",
    "finetuning": "Finetuning shift and trait score",
    "protection": "Steering against finetuning",
    "increments": "Increments at all layers",
    "ablation": "Ablation in training (CAFT)",
    "penalty": "A penalty on projections in training",
    "prompting": "A system prompt in training (inoculation)",
    "projection": "Projection difference of data, and its cheap versions",
    "samples": "Single rows of data",
    "raw": "Raw projection against projection difference",
    "subsets": "Subsets of real data",
    "cosines": "Cosines between traits",
    "features": "Features of a sparse autoencoder",
}
"""Titles by name."""

RANDOM = "random directions of the same length"
SHUFFLED = "the same figures, shuffled over the datasets"
PLAIN_TRAINING = "plain finetuning on the same data"
TURNED = "the same in training, along random directions"
MORE, LESS = Rule(1), Rule(-1)
CHANCE = Rule(1, chance=True)
EFFECT, FALL = Rule(1, own=True, paired=True), Rule(-1, own=True, paired=True)
AHEAD, BEHIND = Rule(1, paired=True), Rule(-1, paired=True)
POINTS = 10.0
"""Points of a score by which a difference may be missed and still count as none."""


def _by_trait(evil: str, sycophantic: str, hallucinating: str) -> Mapping[str, str]:
    return {"evil": evil, "sycophantic": sycophantic, "hallucinating": hallucinating}


def _monitored(kind: str, name: str, whole: Mapping[str, str], inside: Mapping[str, str]) -> tuple[Claim, Claim]:
    steps = ("study",)
    said = f"Where prompts end foretells the score of their replies, over {name}"
    return (
        Claim(f"{kind}-overall", "monitoring", said, whole, "random directions, the best of all layers", steps,
              readings.foretold(kind, within=False), CHANCE, 2),
        Claim(f"{kind}-within", "monitoring", f"{said}, within one condition", inside,
              "random directions, within one condition", steps, readings.foretold(kind, within=True), CHANCE, 2),
    )  # fmt: skip


STEERING = (
    Claim("reliable", "extraction", "Contrasting instructions give a direction of the trait: that of other questions "
          "is much the same (cosine)", "no number", "vectors of swapped arms", ("halves", "tune"),
          readings.reliable, CHANCE, 2),
    Claim("layer", "extraction", "A layer that is chosen by steering raises the trait score", "layers 20, 20 and 16 of "
          "28 chosen (Qwen2.5-7B)", RANDOM, ("tune",), readings.confirmed, EFFECT),
    Claim("unasked", "extraction", "Before finetuning the model shows little of the trait by itself",
          _by_trait("0", "4.4", "20.1"), "the model under a system prompt that asks for the trait", ("cliff",),
          readings.unasked, BEHIND),
    Claim("promotion", "steering", "Adding the vector raises the trait score",
          "from 0.0 to 95.9 (evil, coefficients 0.5 to 2.5)", RANDOM, ("sweep", "tune"),
          readings.swept("promotion"), EFFECT),
    Claim("suppression", "steering", "Subtracting the vector lowers the trait score", "lowered, no number", RANDOM,
          ("sweep", "tune"), readings.swept("suppression"), FALL),
    Claim("holds", "cliff", "A step well below the residual's length leaves the text coherent", "below 1.0 to 1.15 "
          "residual lengths", "the limit of coherence: unsteered text, and a nat a token more", ("cliff",),
          readings.strain(0), LESS, 2),
    Claim("breaks", "cliff", "A step as long as the residual breaks the text", "at 1.0 to 1.15 residual lengths",
          "the limit of coherence: unsteered text, and a nat a token more", ("cliff",), readings.strain(-1), MORE, 2),
    Claim("prompt-mean", "reductions", "The response mean steers better than the prompt mean", "better (figure 11)",
          "the prompt mean, steps of equal length", ("reductions",), readings.reduced("prompt_mean"), AHEAD),
    Claim("prompt-last", "reductions", "The response mean steers better than the last prompt token",
          "better (figure 11)", "the last prompt token, steps of equal length", ("reductions",),
          readings.reduced("prompt_last"), AHEAD),
    Claim("agreement", "judges", "Another judge takes the same of two responses for the one that shows more",
          "94.7% of 300 pairs, by people", "a coin", ("judges",), readings.agreement, MORE, 3),
    *_monitored("prompts", "eight system prompts", _by_trait(".747", ".798", ".830"),
                _by_trait(".511", ".669", ".245")),
    *_monitored("shots", "numbers of examples", _by_trait(".755", ".817", ".634"), _by_trait(".735", ".813", ".400")),
)  # fmt: skip
TRAINING = (
    Claim("levels", "finetuning", "Data that shows the trait teaches it", "higher scores at higher levels",
          "data of the level normal", ("shift",), readings.levelled, MORE),
    Claim("shift", "finetuning", "The shift of prompts along the vector goes with the change of the trait score",
          _by_trait(".826", ".758", ".916"), SHUFFLED, ("shift", "tune"), readings.goes_with("shift", "change"),
          CHANCE, 2),
    Claim("plain", "protection", "Plain finetuning on the trait's data raises its score", "raised, no number",
          "the model before finetuning", ("protection",), readings.treated("plain", "base"), MORE),
    Claim("post-hoc", "protection", "Steering against the trait afterwards takes the score down", "lowered, no number",
          PLAIN_TRAINING, ("protection",), readings.treated("post-hoc"), LESS),
    Claim("preventative", "protection", "Steering towards the trait in training keeps it from being learned",
          "held back, no number", TURNED, ("protection",), readings.treated("preventative", "random"), FALL),
    Claim("ability", "protection", "Steering in training costs less capability than steering afterwards",
          "better MMLU", "capability under steering afterwards", ("protection",),
          readings.kept_ability("preventative", "post-hoc"), MORE, 3),
    Claim("cost", "protection", "Steering while the model answers costs capability",
          "lower MMLU at higher coefficients", "a random direction", ("capability",), readings.steering_cost, LESS, 3),
    Claim("everywhere", "increments", "Increments at all layers take the trait score down", "as one layer does",
          RANDOM, ("increments",), readings.increments, FALL),
    Claim("everywhere-cost", "increments", "They cost less capability than the whole vector at one layer",
          "better MMLU", "one layer", ("capability",), readings.increments_cost, MORE, 3),
    Claim("everywhere-training", "increments", "At all layers in training they keep the trait from being learned",
          "held back, no number", PLAIN_TRAINING, ("protection",), readings.treated("preventative, all layers"), LESS),
    Claim("caft", "ablation", "Ablating the vector in training keeps the trait from being learned",
          "for some traits", PLAIN_TRAINING, ("protection",), readings.treated("caft"), LESS),
    Claim("penalty", "penalty", "A loss term on the projection does not keep the trait out", "does not work",
          PLAIN_TRAINING, ("protection",), readings.treated("regularised"), Rule(1, -POINTS, unit=" points")),
    Claim("inoculation", "prompting", "A system prompt that asks for the trait in training keeps some of it out",
          "no number", PLAIN_TRAINING, ("protection",), readings.treated("prompted"), LESS),
)  # fmt: skip
DATA = (
    Claim("dp", "projection", "The projection difference of a dataset goes with the change that finetuning on it makes",
          {"optimistic": ".873", "impolite": ".900", "apathetic": ".858", "humorous": ".937"}, SHUFFLED,
          ("screen", "shift", "tune"), readings.goes_with("difference", "change", ("screen",)), CHANCE, 2),
    Claim("share", "projection", "So it does with base responses to a part of the rows", "nearly as well", SHUFFLED,
          ("screen-share", "screen", "shift", "tune"),
          readings.goes_with("share_difference", "change", ("screen-share",)), CHANCE, 2),
    Claim("last-token", "projection", "The last prompt token's projection can stand for base responses",
          _by_trait(".931", ".581", ".689"), SHUFFLED, ("screen", "shift", "tune"),
          readings.goes_with("prompt_difference", "difference", ("screen",)), CHANCE, 2),
    Claim("auc-raw", "samples", "Rows that show the trait project higher than normal ones (AUC)",
          _by_trait(".9999", ".9999", ".9948"), "random directions", ("screen", "tune"), readings.separated("raw"),
          CHANCE, 3),
    Claim("auc-difference", "samples", "So does their difference from the base response (AUC)", "no number",
          "random directions", ("screen", "tune"), readings.separated("difference"), CHANCE, 3),
    Claim("raw", "raw", "The raw projection of a dataset goes with the change too", _by_trait(".784", ".540", ".635"),
          SHUFFLED, ("screen", "shift", "tune"), readings.goes_with("raw", "change", ("screen",)), CHANCE, 2),
    Claim("dp-beats-raw", "raw", "The projection difference goes with it better than the raw projection",
          "better, for all traits", "r of the raw projection", ("screen", "shift", "tune"),
          readings.beats("difference", "raw", "change"), AHEAD, 2),
    Claim("high", "subsets", "Of real data, rows of high projection difference teach the trait", "higher scores",
          "rows drawn at random", ("subsets",), readings.subset("high"), MORE),
    Claim("low", "subsets", "Rows of low projection difference teach less of it", "lower scores",
          "rows drawn at random", ("subsets",), readings.subset("low"), LESS),
    Claim("cosine", "cosines", "Vectors of different traits are not independent (cosine, whatever its sign)",
          "evil and sycophantic .368, evil and hallucinating .192, sycophantic and hallucinating .162",
          "random directions", ("cosines",), readings.alike, CHANCE, 2, each=False),
    Claim("feature", "features", "The feature that is most like the vector raises the trait score by itself",
          "features of the trait are among the first", "random features", ("features",), readings.feature, EFFECT),
)  # fmt: skip
CLAIMS: Sequence[Claim] = (*STEERING, *TRAINING, *DATA)


def figures_of(found: Found, tables: Sequence[str]) -> dict[str, Any]:
    """What figures are drawn of, by trait, as JSON values: ``steering``, the curves, and ``datasets``, the points."""
    made: dict[str, Any] = {"steering": {}, "datasets": {}}
    for trait in found.traits:
        try:
            if "steering" in tables:
                layers = [each for each in found("sweep", trait)["layers"] if each["curves"]]
                made["steering"][trait] = {"layer": found.layer(trait), "layers": layers}
        except (MissingError, LookupError, TypeError):
            pass
        try:
            if {"finetuning", "projection", "raw"} & set(tables):
                made["datasets"][trait] = readings.points(found, trait)
        except (MissingError, LookupError, TypeError, ValueError):
            pass
    return {name: plain(each) for name, each in made.items()}
