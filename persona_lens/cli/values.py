"""Values that an option holds in a notation: layers, numbers, and members of an enumeration."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import TypeVar

from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import in_short

Kind = TypeVar("Kind", bound=StrEnum)
_LAYERS = re.compile(r"\s*([0-9]{1,15})(?:-([0-9]{1,15}))?\s*")


def choice(kind: type[Kind], text: str, option: str) -> Kind:
    """The member of an enumeration that an option names."""
    try:
        return kind(text)
    except ValueError:
        raise PersonaLensError(f"{option} takes {', '.join(kind)}; got {text!r}") from None


def numbers(text: str, option: str) -> list[float]:
    """The numbers in a comma-separated option."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise PersonaLensError(
            f"{option} takes numbers with commas between them, such as 0.5,1,2; got {in_short(text)!r}"
        ) from None


def whole_numbers(text: str, option: str, most: int = 2**32) -> tuple[int, ...]:
    """The whole numbers in a comma-separated option."""
    found = numbers(text, option)
    if not all(number.is_integer() and -most < number < most for number in found):
        raise PersonaLensError(
            f"{option} takes whole numbers with commas between them, such as 0,5,10; got {in_short(text)!r}"
        )
    return tuple(map(int, found))


def layer_numbers(text: str, n_layers: int) -> list[int]:
    """The layers in an option: ``18``, ``12,15,18``, ``10-20`` or ``all``.

    Raises:
        PersonaLensError: If it is none of these, or names a layer that the model does not have.
    """
    if text == "all":
        return list(range(n_layers))
    layers: set[int] = set()
    for part in text.split(","):
        found = _LAYERS.fullmatch(part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise PersonaLensError(f"--layers takes 18, 12,15,18, 10-20 or all; got {in_short(text)!r}")
        if last >= n_layers:
            outside = max(first, n_layers)
            raise PersonaLensError(f"layer {outside} does not exist: the model has layers 0 to {n_layers - 1}")
        layers.update(range(first, last + 1))
    return sorted(layers)
