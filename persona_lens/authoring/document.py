"""A written trait as a file: the YAML, and above it where it comes from."""

from __future__ import annotations

import textwrap
from typing import Any

from persona_lens.authoring.draft import Draft
from persona_lens.characters import in_short
from persona_lens.traits.rendering import trait_text

_WIDTH = 108


def written_text(draft: Draft, version: str) -> str:
    """Write the trait file of a finished draft.

    The comment at its head says which model wrote it and how, but not when: the same run writes the same file.

    Args:
        draft: The draft.
        version: That of persona-lens.

    Raises:
        AuthoringError: The draft is not finished.
    """
    facts: dict[str, Any] = {**draft.origin, "requests": draft.requests, "persona-lens": version}
    head = [
        f"{draft.name}: a character trait for persona-lens, written by a model. Read it before you rely on it.",
        "",
        *(f"{name}: {in_short(str(value), 200)}" for name, value in facts.items() if value is not None),
        "",
        *textwrap.wrap(f"The description given: {in_short(draft.description, 5000)}", _WIDTH),
    ]
    fields = {**draft.fields(), "license": "", "tags": [], "references": []}
    return trait_text(fields, head)
