"""What weights can do of a steering: a constant for each layer, and directions that nothing writes any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.backend import Edit, Operation, Positions
from persona_lens.core.errors import PersonaLensError
from persona_lens.steering.notation import NotationError, Term
from persona_lens.steering.steering import NEGLIGIBLE, Steering
from persona_lens.vectors import PersonaVectors

AS_EDIT = (
    "keep it as an edit (`generate --edits`, `serve`), and bake additions to all tokens, such as optimistic@18:+1.5"
)


class BakingError(PersonaLensError):
    """A steering that no weights carry out, or a model that has no place for it."""


def too_long(layer: int, dtype: torch.dtype) -> BakingError:
    """The error of an addition that a precision has no numbers for."""
    name = str(dtype).removeprefix("torch.")
    return BakingError(f"what is added at layer {layer} is beyond {name}; bake with --dtype float32")


@dataclass(frozen=True)
class Plan:
    """What is written into the weights.

    Attributes:
        additions: By layer what every token's residual gets after that block, float64 [d_model].
        basis: Orthonormal columns, float64 [d_model, k]: directions that nothing writes; None takes out none.
    """

    additions: Mapping[int, Float[Tensor, " d_model"]]
    basis: Float[Tensor, "d_model k"] | None = None

    def without(self, rows: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Vectors without their parts along the directions that are taken out, in their own dtype."""
        if self.basis is None:
            return rows
        basis = self.basis.to(rows.device)
        found: Tensor = (rows.double() - (rows.double() @ basis) @ basis.T).to(rows.dtype)
        return found

    def edits(self) -> list[Edit]:
        """The additions as edits of a model that has them in no weights yet."""
        return [Edit.add(layer, added.float()) for layer, added in sorted(self.additions.items())]


def planned(steering: Steering | None, everywhere: Steering | None) -> Plan:
    """What weights do to carry out a steering.

    Args:
        steering: Additions.
        everywhere: Directions to take out of all that is written, see `everywhere_of`.

    Raises:
        BakingError: If the steering does what no weights do.
    """
    additions: dict[int, Tensor] = {}
    for term, edits in steering.by_term() if steering is not None else ():
        for edit in edits:
            _require_addition(term, edit)
            before = additions.get(edit.layer, torch.zeros(len(edit.direction), dtype=torch.float64))
            additions[edit.layer] = before + float(edit.coefficient) * edit.direction.double()
    additions = {layer: added for layer, added in additions.items() if bool(added.any())}
    if everywhere is None:
        return Plan(additions)
    plan = Plan({}, _basis([edit.direction for edit in everywhere.edits()]))
    left = {layer: plan.without(added) for layer, added in additions.items()}
    for layer, rest in left.items():
        if float(rest.norm()) <= NEGLIGIBLE * float(additions[layer].norm()):
            raise BakingError(
                f"what is added at layer {layer} lies in what is taken out everywhere, so that nothing would be left "
                "of it; leave one of them out"
            )
    return replace(plan, additions=left)


def everywhere_of(directions: Sequence[str], vectors: Mapping[str, PersonaVectors]) -> Steering | None:
    """The directions to take out of all that is written, as ablations; None for none.

    Args:
        directions: Each a trait and a layer, ``evil@18``, or ``evil.prompt_mean@18``; without a layer the tuned one.
        vectors: Those that they name, by name.

    Raises:
        BakingError: If one is written otherwise.
        SteeringError: If there are no such vectors, or no such layer.
    """
    if not directions:
        return None
    wrong = "--everywhere takes one direction, a trait and the layer of its vector, such as evil@18; got"
    try:
        found = Steering.parse(", ".join(f"{text}:ablate" for text in directions), vectors)
    except NotationError as error:
        raise BakingError(f"{wrong} {', '.join(directions)!r}") from error
    for term in found.terms:
        assert term.layers is not None
        plain = Term(term.trait, term.layers, Operation.ABLATE, reduction=term.reduction)
        if term != plain or len({*sum(term.layers.ranges, ())}) != 1:
            raise BakingError(f"{wrong} {str(term).removesuffix(':ablate')!r}")
    return found


def _basis(directions: Sequence[Tensor]) -> Float[Tensor, "d_model k"]:
    """Orthonormal columns that span the directions; what rounding alone tells apart counts as one."""
    units = torch.stack([each.double() / each.double().norm() for each in directions])
    left, sizes, _ = torch.linalg.svd(units.T, full_matrices=False)
    basis: Tensor = left[:, sizes > NEGLIGIBLE * sizes[0]]
    return basis


def _require_addition(term: Term, edit: Edit) -> None:
    if edit.operation is Operation.ABLATE:
        raise BakingError(
            f"{term}: an ablation between blocks is in no weights, since the MLP reads what attention has just "
            f"written; leave the term out, and take one layer's direction out of all that is written by --everywhere "
            f"{term.trait}@{edit.layer}, or keep it as an edit"
        )
    reasons = {
        f"what {edit.operation} does depends on the residual": edit.operation is not Operation.ADD,
        "a coefficient in per cent depends on the residual": edit.relative,
        "a condition depends on the residual": edit.condition is not None,
        "weights do not know which tokens come first": edit.schedule is not None,
        "weights treat all tokens alike": edit.positions is not Positions.ALL,
    }
    for reason, holds in reasons.items():
        if holds:
            raise BakingError(f"{term}: {reason}, so that no weights do it; {AS_EDIT}")
