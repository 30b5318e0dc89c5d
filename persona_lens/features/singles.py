"""Single features, each steered alone as the trait's vector is, beside random features of the same dictionary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from persona_lens.features.dictionary import Features
from persona_lens.statistics import CHANGES
from persona_lens.steering import ArmRow, Change, Steering
from persona_lens.steering.arms import UNSTEERED
from persona_lens.steering.changes import Value, change_of
from persona_lens.vectors import DEFAULT_REDUCTION, PersonaVectors, VectorsError

WHOLE = "vector"


@dataclass(frozen=True)
class FeatureEffect:
    """What one feature does to the trait score.

    Attributes:
        feature: Its number; None for the whole vector.
        change: Steered minus unsteered, with that of the random features, taken together question by question, as its
            null.
        surprise: Change of -log p under the unsteered model, nats a token, likewise; None where no judge says.
        beyond: How many of the random features change the score less, in the direction of the coefficient; None
            without random features.
        random_features: How many there are.
        towards: 1 where the coefficient is positive, else -1.
    """

    feature: int | None
    change: Change
    surprise: Change | None
    beyond: int | None
    random_features: int
    towards: int

    @property
    def stands_out(self) -> bool:
        """Whether the change is clear, goes with the coefficient, and beats that of every single random feature."""
        return self.random_features > 0 and self.beyond == self.random_features and self.change.clear == self.towards

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return {
            "feature": self.feature,
            "change": self.change.to_json(),
            "surprise": self.surprise.to_json() if self.surprise else None,
            "beyond": self.beyond,
            "random_features": self.random_features,
            "stands_out": self.stands_out,
        }


def arm_name(feature: int) -> str:
    """What a feature's arm is called."""
    return f"feature_{feature}"


def feature_steering(
    vectors: PersonaVectors,
    features: Features,
    feature: int,
    coefficient: float,
    *,
    reduction: str = DEFAULT_REDUCTION,
) -> Steering:
    """The steering that adds one feature in place of the vector: its unit direction, as long as the vector's step is.

    Args:
        vectors: Whose length at the dictionary's layer is taken.
        features: The dictionary.
        feature: Which feature.
        coefficient: Multiple of the raw vector that the step is as long as.
        reduction: Which of the vectors.

    Raises:
        FeaturesError: If there is no such feature, or its direction is zero.
        VectorsError: If the vector is zero.
    """
    layer = features.layer
    length = float(vectors.vector(layer, reduction).norm())
    if not length > 0:
        raise VectorsError(f"the {reduction} vector of {vectors.trait!r} at layer {layer} is zero")
    rows = torch.zeros(vectors.model.n_layers, vectors.model.d_model)
    rows[layer] = features.unit(feature) * length
    origin = {"feature": feature, "dictionary": features.name, "length_of": vectors.content_hash}
    name = arm_name(feature)
    single = PersonaVectors(name, vectors.model, {DEFAULT_REDUCTION: rows}, origin)
    return Steering.parse(f"{name}@{layer}:{coefficient:+.6g}", single)


def feature_effects(
    rows: Sequence[ArmRow], top: Sequence[int], random: Sequence[int], coefficient: float
) -> Mapping[str, FeatureEffect | None]:
    """The effects of all arms by name, the random features among them; None for one without any score.

    Args:
        rows: Every response.
        top: The features that are claimed to carry the trait.
        random: Those that stand for all others.
        coefficient: With which all were steered.
    """
    towards = 1 if coefficient > 0 else -1
    pooled = [row for row in rows if row.arm in {arm_name(feature) for feature in random}]
    names: dict[str, int | None] = {WHOLE: None, **{arm_name(feature): feature for feature in (*top, *random)}}
    plain = [row for row in rows if row.arm == UNSTEERED]
    if not any(row.arm == WHOLE for row in rows):
        del names[WHOLE]

    def change(own: Sequence[ArmRow], null: Sequence[ArmRow], quantity: str) -> Change | None:
        within = CHANGES if quantity == "score" else None
        return change_of(*(_values(each, quantity) for each in (plain, own, null)), within=within)

    moved = {
        feature: found.vector.mean * towards
        for feature in random
        if (found := change([r for r in rows if r.arm == arm_name(feature)], (), "score")) is not None
    }
    effects: dict[str, FeatureEffect | None] = {}
    for name, feature in names.items():
        own = [row for row in rows if row.arm == name]
        null = () if feature in random else pooled
        score = change(own, null, "score")
        if score is None:
            effects[name] = None
            continue
        beyond = sum(score.vector.mean * towards > other for of, other in moved.items() if of != feature)
        others = len(moved) - (feature in moved)
        surprise = change(own, null, "surprise")
        effects[name] = FeatureEffect(feature, score, surprise, beyond if others else None, others, towards)
    return effects


def _values(rows: Sequence[ArmRow], quantity: str) -> list[Value]:
    return [(row.question, getattr(row, quantity)) for row in rows]
