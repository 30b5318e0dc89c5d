"""`Treatment`: one of the ways to finetune that a study puts side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from persona_lens.finetuning.config import FinetuneConfig, Method, make_config
from persona_lens.finetuning.errors import FinetuningError
from persona_lens.finetuning.methods import measures_of
from persona_lens.steering import Steering
from persona_lens.vectors import PersonaVectors

PLAIN, POST_HOC, RANDOM = "plain", "post-hoc", "random"


@dataclass(frozen=True)
class Treatment:
    """A way to finetune.

    Attributes:
        name: What it is called.
        config: How; its seed is set for each run.
        vectors: What its edits are made of.
    """

    name: str
    config: FinetuneConfig
    vectors: PersonaVectors

    def at(self, seed: int) -> FinetuneConfig:
        """The configuration with a seed."""
        return self.config.model_copy(update={"seed": seed})


@dataclass(frozen=True)
class TreatmentSettings:
    """What the treatments do, in the notation of steerings; None leaves one out.

    Attributes:
        preventative: Added while training; the random directions are of its norm.
        everywhere: The same at all layers, by increments.
        post_hoc: Applied to the plainly finetuned model when it answers.
        caft: Ablated while training.
        regularised: Traits and layers that the penalty is on.
        penalty: Weight of the penalty.
        prompted: Whether a system prompt that calls the trait forth stands in the training data.
        random: Whether the preventative steering also runs in random directions, another one for each seed.
    """

    preventative: str | None
    everywhere: str | None = None
    post_hoc: str | None = None
    caft: str | None = None
    regularised: str | None = None
    penalty: float = 1.0
    prompted: bool = True
    random: bool = True

    @staticmethod
    def of(
        vectors: PersonaVectors, layer: int, coefficient: float, increments: float | None = None
    ) -> TreatmentSettings:
        """All treatments at one layer, with one coefficient.

        Args:
            vectors: The trait.
            layer: Block index, 0-based.
            coefficient: What preventative steering adds; post-hoc steering takes as much away.
            increments: The same for the steering at all layers; None leaves that out.
        """
        at = f"{vectors.trait}@{layer}"
        return TreatmentSettings(
            preventative=f"{at}:{coefficient:+g}",
            everywhere=f"{vectors.trait}@all:increments({increments:+g})" if increments is not None else None,
            post_hoc=f"{at}:{-coefficient:+g}",
            caft=f"{at}:ablate",
            regularised=f"{at}:ablate",
        )


def treatments_of(settings: TreatmentSettings, config: FinetuneConfig, vectors: PersonaVectors) -> list[Treatment]:
    """The treatments that train, plain training first; all else in their configurations is the same.

    Raises:
        FinetuningError: If the configuration names a method itself, or a treatment does not fit the vectors.
        NotationError, SteeringError: If one is not written as steerings are.
    """
    if config.method is not Method.PLAIN:
        raise FinetuningError(f"a study sets the method itself; take {config.method} out of the configuration")
    wanted: list[tuple[str, Method, str | None]] = [
        ("preventative", Method.PREVENTATIVE, settings.preventative),
        ("preventative, all layers", Method.PREVENTATIVE, settings.everywhere),
        ("caft", Method.CAFT, settings.caft),
        ("regularised", Method.REGULARISED, settings.regularised),
    ]
    found = [Treatment(PLAIN, config, vectors)]
    for name, method, edits in wanted:
        if edits is not None:
            penalty = settings.penalty if method is Method.REGULARISED else None
            found.append(Treatment(name, _with(config, method=method, edits=edits, penalty=penalty), vectors))
    if settings.prompted:
        found.append(Treatment("prompted", _with(config, method=Method.PROMPTED), vectors))
    if settings.random and settings.preventative is not None:
        found.append(Treatment(RANDOM, _with(config, method=Method.PREVENTATIVE, edits=settings.preventative), vectors))
    for each in found:
        measures_of(each.config, [each.vectors])
    return found


def turned(treatment: Treatment, seed: int) -> Treatment:
    """The treatment in random directions of equal norm."""
    own = treatment.vectors
    null = own.random_like(seed)
    provenance = {**null.provenance, "trait": own.provenance.get("trait", {})}
    return replace(treatment, vectors=replace(null, trait=own.trait, provenance=provenance))


def post_hoc_of(settings: TreatmentSettings, vectors: PersonaVectors) -> Steering | None:
    """The steering of the plainly finetuned model."""
    return None if settings.post_hoc is None else Steering.parse(settings.post_hoc, vectors)


def _with(config: FinetuneConfig, **changes: Any) -> FinetuneConfig:
    return make_config({**config.model_dump(), **changes})
