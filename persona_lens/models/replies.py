"""The form in which a backend's model is asked, and what is to be said of its replies."""

from __future__ import annotations

from persona_lens.backend import Backend
from persona_lens.core.progress import note
from persona_lens.models.chat import ChatFormat


def chat_format(backend: Backend) -> ChatFormat:
    """The chat format of a backend's model."""
    return ChatFormat.from_tokenizer(backend.tokenizer)


def note_reasoning(chat: ChatFormat) -> None:
    """Say, where a model reasons before it answers, that activations have the reasoning in them and judges do not."""
    if chat.reasons:
        note(
            "this model reasons before it answers: what is read and steered over a response takes in its reasoning, "
            "while a judge sees the answer alone"
        )
