"""`Pursuit`: how few features carry how much of a vector, by orthogonal matching pursuit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.features.dictionary import Features, FeaturesError
from persona_lens.features.ranking import chunk_rows

CANDIDATES = 4096
# Digits that are kept: the units have seven, and the last of a double depend on where in memory its matrix lies, so
# that a run which was killed and went on would differ from one that was not.
DIGITS = 9
EXHAUSTED = 1e-5  # of a direction's length: what is left of it beyond those already taken is rounding


@dataclass(frozen=True)
class Pursuit:
    """A sparse reconstruction, feature by feature.

    Attributes:
        features: In the order in which they were taken.
        shares: Share of the vector's squared length that the first k features carry, for k = 1, 2, ...
        coefficients: With which the unit directions of all of them are added up, in lengths of the vector; they may be
            negative, which an autoencoder's activations are not.
        candidates: Among how many features each was chosen.
        exact: Whether these were all there are.
    """

    features: tuple[int, ...]
    shares: tuple[float, ...]
    coefficients: tuple[float, ...]
    candidates: int
    exact: bool

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


def pursue(
    features: Features,
    direction: Float[Tensor, " d_model"],
    cosines: Float[Tensor, " features"],
    count: int,
    *,
    candidates: int = CANDIDATES,
) -> Pursuit:
    """Rebuild a vector from few features: each time the one most like what is still missing, then all refitted.

    The few lines are our own, since scikit-learn's would need all candidates' products at once. Of a large dictionary
    only the features most like the vector, by absolute cosine, are candidates: what is less like it than thousands of
    others is hardly ever taken.

    Args:
        features: The dictionary.
        direction: The vector.
        cosines: Its cosines with all features.
        count: How many features to take at most; fewer are taken where nothing is left.
        candidates: How many features to choose among.

    Raises:
        FeaturesError: If fewer than one feature is asked for.
    """
    if count < 1 or candidates < 1:
        raise FeaturesError("a reconstruction takes at least one feature, chosen among at least one")
    chosen = cosines.abs().nan_to_num(nan=-1.0).topk(min(candidates, len(cosines))).indices
    chosen = chosen[torch.isfinite(cosines[chosen])]
    rows = features.rows(chosen, chunk_rows(features.d_model))
    units = rows / rows.norm(dim=-1, keepdim=True)
    target = direction.double() / direction.double().norm()
    left, basis = target, torch.empty(0, len(target), dtype=torch.float64)
    taken: list[int] = []
    shares: list[float] = []
    for _ in range(min(count, len(chosen), features.d_model)):
        products = (units @ left.float()).abs()
        products[taken] = -1.0
        place = int(products.argmax())
        unit = units[place].double()
        for _again in range(2):  # once more takes out what rounding left
            unit = unit - basis.T @ (basis @ unit)
        if float(unit.norm()) < EXHAUSTED or float(left.norm()) < EXHAUSTED:
            break
        unit = unit / unit.norm()
        basis = torch.cat([basis, unit.unsqueeze(0)])
        left = left - (unit @ left) * unit
        taken.append(place)
        shares.append(1 - _rounded(float(left @ left)))
    coefficients = torch.linalg.lstsq(units[taken].double().T, target.unsqueeze(-1)).solution[:, 0].tolist()
    exact = len(chosen) == len(cosines)
    return Pursuit(tuple(chosen[taken].tolist()), tuple(shares), tuple(map(_rounded, coefficients)), len(chosen), exact)


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
