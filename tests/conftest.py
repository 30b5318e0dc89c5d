"""Checks array shapes at run time: every annotated function of the package runs under beartype in the tests."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

# Their source is sent to servers, which have neither jaxtyping nor beartype: they must stay as they are written.
TRAVELLING = {"intervention", "logprobs", "residual", "sampling", "writing"}
BACKEND = Path(__file__).resolve().parents[1] / "persona_lens" / "backend"

hook = install_import_hook(
    [
        *(f"persona_lens.backend.{path.stem}" for path in BACKEND.glob("*.py") if path.stem not in TRAVELLING),
        "persona_lens.vectors",
        "persona_lens.exchange",
        "persona_lens.geometry",
        "persona_lens.extraction",
        "persona_lens.steering",
        "persona_lens.judging",
        "persona_lens.capability",
        "persona_lens.lenses",
        "persona_lens.features",
    ],
    "beartype.beartype",
)
