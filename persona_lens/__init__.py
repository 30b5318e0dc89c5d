"""Find, read and control character traits in language models with persona vectors.

Everything public can be imported from here; a name's module is loaded when the name is first used, so that importing
the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from persona_lens.backend import Backend as Backend
    from persona_lens.backend import Edit as Edit
    from persona_lens.backend import Positions as Positions
    from persona_lens.backend import Read as Read
    from persona_lens.backend import Sampling as Sampling
    from persona_lens.backend import TokenBatch as TokenBatch
    from persona_lens.backend import open_backend as open_backend
    from persona_lens.backend import wrap_model as wrap_model
    from persona_lens.core.errors import PersonaLensError as PersonaLensError
    from persona_lens.extraction import extract as extract
    from persona_lens.steering import Steering as Steering
    from persona_lens.steering import load_steering as load_steering
    from persona_lens.steering import reply as reply
    from persona_lens.steering import sweep as sweep
    from persona_lens.traits import load_trait as load_trait
    from persona_lens.vectors import PersonaVectors as PersonaVectors
    from persona_lens.vectors import load_vectors as load_vectors

_HOMES = {
    "Backend": "backend",
    "Edit": "backend",
    "PersonaLensError": "core.errors",
    "PersonaVectors": "vectors",
    "Positions": "backend",
    "Read": "backend",
    "Sampling": "backend",
    "Steering": "steering",
    "TokenBatch": "backend",
    "reply": "steering",
    "extract": "extraction",
    "load_steering": "steering",
    "load_trait": "traits",
    "load_vectors": "vectors",
    "open_backend": "backend",
    "sweep": "steering",
    "wrap_model": "backend",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and seldom needed

    try:
        return version("persona-lens")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted(__all__)
