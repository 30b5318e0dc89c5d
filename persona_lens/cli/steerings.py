"""Steerings on the command line: ``--edits`` and the vectors that they name, or one layer and its coefficients."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from persona_lens.cli.settings import Option, given_options
from persona_lens.cli.values import choice, numbers
from persona_lens.core.errors import PersonaLensError

if TYPE_CHECKING:
    from persona_lens.steering import Steering
    from persona_lens.vectors import PersonaVectors, Tuned

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
        from persona_lens.steering import Steering, load_steering
        from persona_lens.steering.files import is_steering_file

        more = list(map(_read_vectors, self.more_vectors or ()))
        named: dict[str, PersonaVectors] = {}
        for name, each in [*((own.trait, own) for own in vectors), *more]:
            if name in named:
                raise PersonaLensError(f"two vectors go by the name {name!r}; rename one, --with NAME=PATH")
            named[name] = each
        steerings = {
            spec: load_steering(spec, named) if is_steering_file(spec) else Steering.parse(spec, named)
            for spec in self.edits or ()
        }
        used = [each for steering in steerings.values() for each in steering.vectors.values()]
        for name, each in more:
            if not any(each is other for other in used):
                raise PersonaLensError(f"--with brings vectors of {name!r}, which no --edits names; leave them out")
        return steerings


def _read_vectors(given: str) -> tuple[str, PersonaVectors]:
    """Vectors and the name they go by, of ``PATH`` or ``NAME=PATH``."""
    from persona_lens.vectors import load_vectors

    renamed = RENAMED.fullmatch(given)
    loaded = load_vectors(renamed[2] if renamed else given)
    return renamed[1] if renamed else loaded.trait, loaded


@dataclass(frozen=True)
class LayerOptions:
    """The simple way to say what to steer: one layer, several coefficients.

    Attributes:
        layer: Layer to steer, counted from 0; None for the one that was tuned.
        coefficients: Multiples of the raw vector; 0 is always shown too.
        positions: `all`, `prompt`, `response` or `generating`; None for all.
        reduction: Which of the vectors.
    """

    layer: int | None = None
    coefficients: Annotated[str | None, Option(shown=f"the one that was tuned, or {COEFFICIENTS} with --layer")] = None
    positions: str | None = None
    reduction: Annotated[str | None, Option(shown="the one that was tuned, or response_mean with --layer")] = None

    def choice(self, vectors: PersonaVectors) -> Tuned:
        """What to steer along, and how strongly, with what was tuned where no layer was given.

        Raises:
            PersonaLensError: If no layer was given, and none was tuned.
        """
        from persona_lens.vectors import DEFAULT_REDUCTION, Tuned

        if self.layer is not None:
            return Tuned(self.layer, 0.0, self.reduction or DEFAULT_REDUCTION)
        if vectors.tuned is None:
            raise PersonaLensError(
                f"no layer was tuned for the vectors of {vectors.trait!r}; give one with --layer, write --edits "
                f"'{vectors.trait}@LAYER:+1.5', or take the vectors that `persona-lens steer tune` wrote"
            )
        return Tuned(vectors.tuned.layer, vectors.tuned.coefficient, self.reduction or vectors.tuned.reduction)

    def open(self, vectors: PersonaVectors) -> dict[float, Steering | None]:
        """The steerings by their coefficients, 0 among them, ascending."""
        from persona_lens.backend import Operation, Positions
        from persona_lens.steering import Steering
        from persona_lens.steering.notation import Layers, Term

        chosen = self.choice(vectors)
        wanted = choice(Positions, self.positions or Positions.ALL, "--positions")
        written = self.coefficients
        if written is None:
            written = COEFFICIENTS if self.layer is not None else repr(chosen.coefficient)

        def steering(coefficient: float) -> Steering:
            layers = Layers(((chosen.layer, chosen.layer),))
            term = Term(vectors.trait, layers, Operation.ADD, coefficient, reduction=chosen.reduction, positions=wanted)
            return Steering((term,), {vectors.trait: vectors})

        strengths = sorted({0.0, *numbers(written, "--coefficients")})
        return {strength: steering(strength) if strength else None for strength in strengths}


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
