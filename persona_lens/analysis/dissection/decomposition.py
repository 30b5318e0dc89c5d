"""What features a vector is made of: `Ranking` by cosine beside random directions, `Pursuit` by reconstruction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.dissection.features import Decoder, Features, spans
from persona_lens.core.documents import Record

CANDIDATES = 4096
# Digits that are kept: the units have seven, and the last of a double depend on where in memory its matrix lies, so
# that a run which was killed and went on would differ from one that was not.
DIGITS = 9
EXHAUSTED = 1e-5  # of a direction's length: what is left of it beyond those already taken is rounding


@dataclass(frozen=True)
class Pursuit(Record):
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
        AnalysisError: If fewer than one feature is asked for.
    """
    if count < 1 or candidates < 1:
        raise AnalysisError("a reconstruction takes at least one feature, chosen among at least one")
    chosen = cosines.abs().nan_to_num(nan=-1.0).topk(min(candidates, len(cosines))).indices
    chosen = chosen[torch.isfinite(cosines[chosen])]
    rows = features.rows(chosen)
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


@dataclass(frozen=True)
class RankedFeature:
    """A feature and how alike it is.

    Attributes:
        feature: Its number.
        cosine: Between its decoder direction and the vector.
    """

    feature: int
    cosine: float


@dataclass(frozen=True)
class Ranking(Record):
    """The features most like a vector, and least (method, section 8).

    Attributes:
        top: By cosine, largest first.
        bottom: By cosine, smallest (most negative) first.
        features: How many there are.
        zero: How many have no direction; they are left out.
        random_top: Largest cosine of any feature with each of some random directions, largest first; empty without
            them.
    """

    top: tuple[RankedFeature, ...]
    bottom: tuple[RankedFeature, ...]
    features: int
    zero: int
    random_top: tuple[float, ...]


def decoder_cosines(decoder: Decoder, directions: Float[Tensor, "k d_model"]) -> Float[Tensor, "k features"]:
    """Cosine of each direction with every decoder direction, in one pass over the decoder.

    The decoder is read some rows at a time, so that memory does not grow with the number of features but for the
    result: 4 bytes a feature and direction.

    Returns:
        float32; NaN for features whose direction is zero or not finite.

    Raises:
        AnalysisError: If a direction is of another width, zero or not finite.
    """
    count, width = decoder.shape
    if directions.shape[-1] != width:
        raise AnalysisError(f"directions of width {directions.shape[-1]} do not fit a decoder of width {width}")
    norms = directions.float().norm(dim=-1, keepdim=True)
    if not bool((torch.isfinite(norms) & (norms > 0)).all()):
        raise AnalysisError("a direction that is zero or not finite has no cosine with anything")
    units = (directions.float() / norms).T.contiguous()
    found = torch.empty(len(directions), count)
    for start, stop in spans(decoder):
        rows = decoder.rows(start, stop)
        found[:, start:stop] = ((rows @ units) / rows.norm(dim=-1, keepdim=True)).T
    found[~torch.isfinite(found)] = torch.nan
    return found


def rank(cosines: Float[Tensor, " features"], count: int, random: Float[Tensor, "k features"] | None = None) -> Ranking:
    """The ends of a vector's cosines.

    Args:
        cosines: As `decoder_cosines` has them.
        count: How many features on either side.
        random: Cosines of random directions.

    Raises:
        AnalysisError: If no feature has a direction, or fewer than one is asked for.
    """
    if count < 1:
        raise AnalysisError(f"at least one feature has to be shown, not {count}")
    known = torch.isfinite(cosines)
    if not bool(known.any()):
        raise AnalysisError("no feature of this dictionary has a direction")
    kept = min(count, int(known.sum()))

    def ends(largest: bool) -> tuple[RankedFeature, ...]:
        values, places = cosines.nan_to_num(nan=-2.0 if largest else 2.0).topk(kept, largest=largest)
        return tuple(RankedFeature(i, c) for i, c in zip(places.tolist(), values.tolist(), strict=True))

    beside = (
        () if random is None else tuple(random.nan_to_num(nan=-2.0).amax(dim=1).sort(descending=True).values.tolist())
    )
    return Ranking(ends(True), ends(False), len(cosines), int((~known).sum()), beside)
