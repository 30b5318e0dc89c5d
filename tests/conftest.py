"""Checks array shapes at run time: every annotated function of the package runs under beartype in the tests."""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

hook = install_import_hook(
    [
        "persona_lens.backend",
        "persona_lens.vectors",
        "persona_lens.extraction",
        "persona_lens.steering",
        "persona_lens.judging",
    ],
    "beartype.beartype",
)
