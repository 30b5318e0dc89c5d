"""Steerings on the command line: ``--edits``, or one layer and its coefficients."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from persona_lens.cli import options
from persona_lens.cli.settings import Option, choice, given_options, numbers
from persona_lens.core.errors import PersonaLensError

if TYPE_CHECKING:
    from persona_lens.steering import Steering
    from persona_lens.vectors import PersonaVectors

# NAME=PATH, where NAME is what the notation takes for the name of a trait.
RENAMED = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)=(.+)")
COEFFICIENTS = "-2,2"


@dataclass(frozen=True)
class SteeringOptions:
    """Steerings as they are written, and the vectors that they name beside the command's own.

    Attributes:
        edits: A steering such as `optimistic@18:+1.5, evil@all:ablate`, or its .yaml or .safetensors file. Repeatable.
        more_vectors: More vectors for `--edits` to name: a run folder or file; `NAME=PATH` renames. Repeatable.
    """

    edits: Annotated[list[str] | None, Option(metavar="SPEC")] = None
    more_vectors: Annotated[list[str] | None, Option(names=("--with",), metavar="PATH")] = None

    def open(self, *vectors: PersonaVectors) -> dict[str, Steering]:
        """The steerings by how they were given.

        Args:
            vectors: Those that the command was given; they go by the names of their traits.

        Raises:
            NotationError: If one is not written as steerings are.
            PersonaLensError: If vectors cannot be read, share a name, or were named by ``--with`` and are not used.
        """
        from persona_lens.steering.given import read_steering

        more = list(map(_read_vectors, self.more_vectors or ()))
        named: dict[str, PersonaVectors] = {}
        for name, each in [*((own.trait, own) for own in vectors), *more]:
            if name in named:
                raise PersonaLensError(f"two vectors go by the name {name!r}; rename one, --with NAME=PATH")
            named[name] = each
        steerings = {spec: read_steering(spec, named) for spec in self.edits or ()}
        used = [each for steering in steerings.values() for each in steering.vectors.values()]
        for name, each in more:
            if not any(each is other for other in used):
                raise PersonaLensError(f"--with brings vectors of {name!r}, which no --edits names; leave them out")
        return steerings


def named_vectors(given: Sequence[str]) -> dict[str, PersonaVectors]:
    """Vectors by the names that a steering uses, each given as ``PATH`` or ``NAME=PATH``.

    Raises:
        PersonaLensError: If they cannot be read, or share a name.
    """
    named: dict[str, PersonaVectors] = {}
    for name, each in map(_read_vectors, given):
        if name in named:
            raise PersonaLensError(f"two vectors go by the name {name!r}; rename one, NAME=PATH")
        named[name] = each
    return named


def _read_vectors(given: str) -> tuple[str, PersonaVectors]:
    """Vectors and the name they go by, of ``PATH`` or ``NAME=PATH``."""
    renamed = RENAMED.fullmatch(given)
    loaded = options.open_vectors(Path(renamed[2] if renamed else given))
    return renamed[1] if renamed else loaded.trait, loaded


@dataclass(frozen=True)
class LayerOptions:
    """The simple way to say what to steer: one layer, several coefficients.

    Attributes:
        layer: Layer to steer, counted from 0; None for the one that was tuned.
        coefficients: Multiples of the raw vector; 0 is always shown too.
        positions: `all`, `prompt`, `response`, `generating`, `thinking` or `answer`; None for all.
        reduction: Which of the vectors.
    """

    layer: int | None = None
    coefficients: Annotated[str | None, Option(shown=f"the one that was tuned, or {COEFFICIENTS} with --layer")] = None
    positions: str | None = None
    reduction: Annotated[str | None, Option(shown="the one that was tuned, or the vectors' own with --layer")] = None

    def open(self, vectors: PersonaVectors) -> dict[float, Steering | None]:
        """The steerings by their coefficients, 0 among them, ascending; along what was tuned where no layer was given.

        Raises:
            PersonaLensError: If no layer was given, and none was tuned.
        """
        from persona_lens.backend import Positions
        from persona_lens.steering import Steering
        from persona_lens.vectors import Tuned

        if self.layer is not None:
            chosen, written = Tuned(self.layer, 0.0, vectors.default_reduction), COEFFICIENTS
        elif vectors.tuned is not None:
            chosen, written = vectors.tuned, repr(vectors.tuned.coefficient)
        else:
            raise PersonaLensError(
                f"no layer was tuned for the vectors of {vectors.trait!r}; give one with --layer, write --edits "
                f"'{vectors.trait}@LAYER:+1.5', or take the vectors that `persona-lens steer tune` wrote"
            )
        reduction = self.reduction or chosen.reduction
        positions = choice(Positions, self.positions or Positions.ALL, "--positions")

        def steering(coefficient: float) -> Steering:
            return Steering.adding(vectors, chosen.layer, coefficient, reduction=reduction, positions=positions)

        strengths = {0.0, *numbers(written if self.coefficients is None else self.coefficients, "--coefficients")}
        return {strength: steering(strength) if strength else None for strength in sorted(strengths)}


@dataclass(frozen=True)
class Candidate:
    """One of the steerings that stand side by side.

    Attributes:
        title: What to call it.
        steering: What it does; None for the unsteered model.
        coefficient: Of the one layer; None where it was written as ``--edits``.
    """

    title: str
    steering: Steering | None
    coefficient: float | None = None


def candidates(vectors: PersonaVectors, written: SteeringOptions, one_layer: LayerOptions) -> Sequence[Candidate]:
    """What was asked for, the unsteered model among it.

    Raises:
        PersonaLensError: If both ways were used, or neither says where to steer.
    """
    if written.edits:
        if other := given_options(one_layer):
            raise PersonaLensError(f"--edits says everything that {', '.join(other)} would; give one or the other")
        steerings = written.open(vectors)
        return [Candidate("unsteered", None), *(Candidate(spec, each) for spec, each in steerings.items())]
    if written.more_vectors:
        raise PersonaLensError("--with brings vectors for --edits to name; give --edits too")
    return [
        Candidate(f"{vectors.trait} {strength:+g}" if strength else "unsteered", each, strength)
        for strength, each in one_layer.open(vectors).items()
    ]
