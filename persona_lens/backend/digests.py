"""Digests of a sample of a model's weights: the same in every precision, others for finetuned and quantised weights.

Weights are compared as bfloat16 holds them. A checkpoint in float32 keeps that when it is loaded as float16, but for
those of its numbers that float16 puts in the very middle between two of bfloat16's, one in eight: which of the two it
was, float16 no longer knows. No function of the weights can be blind to that and see a small finetune. So a digest has
two parts: a hash over all of the sample, which settles most cases, and short hashes of groups of it, left open (``.``)
where a member's rounding is. Two digests are of the same weights if the hashes are equal, or if one has open groups and
all others agree. See `same_weights`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

SAMPLES_PER_PARAMETER = 16
GROUPS, GROUP_SIZE = 128, 4
LEAST_IN_COMMON = 24  # groups; a chance of 16**-24 that other weights agree in so many
OPEN = "."


def weights_digest(blocks: nn.ModuleList, is_copy: Callable[[str], bool] = lambda name: False) -> str | None:
    """A digest that tells two models apart, base from finetuned included, and costs milliseconds.

    Sixteen values spread over each parameter, in an order that does not depend on the parameters' names, which
    libraries change. None where weights are offloaded to disk.

    Args:
        blocks: The decoder blocks.
        is_copy: Says of a parameter's name whether a library added it as a copy of a part of another one.

    Returns:
        ``sha256:``, 32 hexadecimal digits, ``:``, and one digit or dot for each group.
    """
    if any(parameter.is_meta for parameter in blocks.parameters()):
        return None
    whole, samples = hashlib.sha256(), []
    for block in blocks:
        parameters = [p.detach() for name, p in block.named_parameters() if not is_copy(name)]
        whole.update(repr(sorted(tuple(p.shape) for p in parameters)).encode())
        samples.append(_sorted(parameters))
    values, is_open = (torch.cat(parts) for parts in zip(*samples, strict=True))
    whole.update(_bytes(values))
    return f"sha256:{whole.hexdigest()[:32]}:{_groups(values, is_open)}"


def same_weights(one: str, other: str) -> bool:
    """Whether two digests are of the same weights, in whatever precision each was loaded."""
    if one == other:
        return True
    groups = [digest.rpartition(":")[2] for digest in (one, other)]
    if len({len(each) for each in groups}) > 1 or not any(OPEN in each for each in groups):
        return False
    known = [pair for pair in zip(*groups, strict=True) if OPEN not in pair]
    return len(known) >= LEAST_IN_COMMON and all(a == b for a, b in known)


def _sorted(parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A sample of the values, float32 and ascending, and which of them are open.

    Rounding keeps the order of numbers, so that sorted values stand in the same order in every precision.
    """
    samples = []
    for parameter in parameters:
        flat = parameter.reshape(-1)
        step = max(1, (flat.numel() - 1) // (SAMPLES_PER_PARAMETER - 1))
        samples.append(flat[::step][:SAMPLES_PER_PARAMETER].cpu())
    values, order = torch.cat([sample.float() for sample in samples]).sort()
    return values, torch.cat([_is_open(sample) for sample in samples])[order]


def _bytes(values: Tensor) -> bytes:
    """The values as bfloat16 holds them; zero has no sign."""
    return (values.to(torch.bfloat16) + 0.0).view(torch.int16).numpy().tobytes()


def _groups(values: Tensor, is_open: Tensor) -> str:
    places = torch.linspace(0, len(values) - 1, GROUPS * GROUP_SIZE).round().long().view(GROUPS, GROUP_SIZE)
    hashes = (hashlib.sha256(_bytes(values[group])).hexdigest()[0] for group in places)
    unknown = is_open[places].any(dim=1).tolist()
    return "".join(OPEN if each else digit for each, digit in zip(unknown, hashes, strict=True))


def _is_open(values: Tensor) -> Tensor:
    """Where a float16 number may have come from numbers that bfloat16 tells apart; nowhere in other precisions."""
    if values.dtype is not torch.float16:
        return torch.zeros_like(values, dtype=torch.bool)
    infinity = torch.full_like(values, torch.inf)
    below, above = (((values.float() + torch.nextafter(values, end).float()) / 2) for end in (-infinity, infinity))
    return (below.to(torch.bfloat16) != above.to(torch.bfloat16)) | ~values.isfinite()
