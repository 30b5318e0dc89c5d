"""Traits written by a model, and traits taken over from the reference implementation.

A model is asked for one part of a trait at a time: the adjectives, the instructions, the questions, the rubric. Every
reply is checked, what is good is kept, and what is missing is asked for again. Importing this package loads neither
torch nor transformers.
"""

from __future__ import annotations

from persona_lens.traits.generate.authors import (
    Author,
    AuthoringError,
    LocalAuthor,
    ServerAuthor,
    on_server,
    open_author,
)
from persona_lens.traits.generate.draft import Draft, load_draft, new_draft, written_text
from persona_lens.traits.generate.reference import Imported, import_reference
from persona_lens.traits.generate.writing import Limits, PlannedStep, Written, plan, write_trait

__all__ = [
    "Author",
    "AuthoringError",
    "Draft",
    "Imported",
    "Limits",
    "LocalAuthor",
    "PlannedStep",
    "ServerAuthor",
    "Written",
    "import_reference",
    "load_draft",
    "new_draft",
    "on_server",
    "open_author",
    "plan",
    "write_trait",
    "written_text",
]
