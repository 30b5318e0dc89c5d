"""What each method adds to plain training: edits, a penalty, or system prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from persona_lens.backend import Edit, Operation
from persona_lens.finetuning.config import FinetuneConfig, Method
from persona_lens.finetuning.errors import FinetuningError
from persona_lens.steering import Steering, trait_of
from persona_lens.traits import Arm
from persona_lens.vectors import PersonaVectors


@dataclass(frozen=True)
class Measures:
    """What is done beside plain training.

    Attributes:
        edits: Made in every training forward.
        penalised: Directions, with their layers, along which a penalty holds the model.
        prompts: System prompts that stand before the training data in turn.
        steering: What the edits come from; None without them.
    """

    edits: tuple[Edit, ...] = ()
    penalised: tuple[Edit, ...] = ()
    prompts: tuple[str, ...] = ()
    steering: Steering | None = None


def plain() -> Measures:
    """Nothing: training as it is."""
    return Measures()


def preventative(steering: Steering) -> Measures:
    """Push along the trait while training, so that the data need not: h + alpha v in every training forward.

    At one layer, or by increments at all of them (method, section 6).

    Raises:
        FinetuningError: If something else than an addition is made.
    """
    if others := [edit.operation for edit in steering.edits() if edit.operation is not Operation.ADD]:
        raise FinetuningError(f"preventative steering adds vectors, and {str(steering)!r} does {others[0]}; use caft")
    return Measures(edits=steering.edits(), steering=steering)


def caft(steering: Steering) -> Measures:
    """Concept ablation finetuning: the direction is taken out of every training forward, so nothing is learned by it.

    Raises:
        FinetuningError: If something else than an ablation is made.
    """
    if others := [edit.operation for edit in steering.edits() if edit.operation is not Operation.ABLATE]:
        raise FinetuningError(
            f"caft ablates, and {str(steering)!r} does {others[0]}; write {steering.terms[0].trait}@LAYER:ablate"
        )
    return Measures(edits=steering.edits(), steering=steering)


def regularised(steering: Steering) -> Measures:
    """A loss term on the change of the projections on the steering's directions; nothing is edited."""
    return Measures(penalised=steering.edits(), steering=steering)


def prompted(prompts: Sequence[str]) -> Measures:
    """Preventative prompting: the training data stands under system prompts that call the trait forth."""
    return Measures(prompts=tuple(prompts))


def measures_of(config: FinetuneConfig, vectors: Iterable[PersonaVectors]) -> Measures:
    """What a configuration asks for.

    Args:
        config: Names the method.
        vectors: Those that its edits name; for prompting the first give the trait.

    Raises:
        NotationError, SteeringError: If the edits are not written as steerings are, or name other vectors.
        FinetuningError: If they do something that the method does not, or vectors are missing.
    """
    given = list(vectors)
    if config.method is Method.PLAIN:
        return plain()
    if config.method is Method.PROMPTED:
        if config.prompt is not None:
            return prompted([config.prompt])
        if not given:
            raise FinetuningError(
                "prompted needs a system prompt (prompt), or vectors whose trait has some (--vectors)"
            )
        trait = trait_of(given[0])
        return prompted([trait.system_prompt(Arm.POSITIVE, pair) for pair in range(len(trait.instructions))])
    if not given:
        raise FinetuningError(f"the edits {config.edits!r} name vectors, and none are given (--vectors)")
    assert config.edits is not None  # a configuration without them is refused
    steering = Steering.parse(config.edits, given)
    made = {Method.PREVENTATIVE: preventative, Method.CAFT: caft, Method.REGULARISED: regularised}
    return made[config.method](steering)
