"""Traits and roles written by a model, and traits taken over from the reference implementation.

A model is asked for one part at a time: of a trait the adjectives, the instructions, the questions, the rubric. Every
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
from persona_lens.traits.generate.casting import CASTING, RoleDraft, write_role
from persona_lens.traits.generate.draft import Draft
from persona_lens.traits.generate.reference import Imported, import_reference
from persona_lens.traits.generate.session import Limits, PlannedStep, Procedure, Written
from persona_lens.traits.generate.unfinished import Unfinished, written_text
from persona_lens.traits.generate.writing import WRITING, plan, write_trait

__all__ = [
    "CASTING",
    "WRITING",
    "Author",
    "AuthoringError",
    "Draft",
    "Imported",
    "Limits",
    "LocalAuthor",
    "PlannedStep",
    "Procedure",
    "RoleDraft",
    "ServerAuthor",
    "Unfinished",
    "Written",
    "import_reference",
    "on_server",
    "open_author",
    "plan",
    "write_role",
    "write_trait",
    "written_text",
]
