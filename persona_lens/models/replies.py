"""One question and its answer, with or without edits."""

from __future__ import annotations

from persona_lens.backend import Backend, Edits, Sampling, as_edits
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


def reply(
    backend: Backend,
    question: str,
    *,
    system: str | None = None,
    edits: Edits = (),
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    seed: int = 0,
    chat: ChatFormat | None = None,
) -> str:
    """Ask the model one question.

    Args:
        backend: The model.
        question: User message.
        system: System prompt.
        edits: Applied throughout; `persona_lens.steering.reply` takes the notation of a steering too.
        max_new_tokens: Length limit in tokens.
        temperature: 0 is greedy.
        seed: Of the sampling; of no meaning to greedy replies.
        chat: Chat format; the model's own by default.

    Returns:
        The answer as text, without reasoning and control tokens.
    """
    chat = chat or chat_format(backend)
    sampling = Sampling(max_new_tokens, temperature, seeds=(seed,) if temperature else None)
    generation = backend.generate([chat.encode(system, question)], sampling, as_edits(edits))
    return chat.answer(generation.responses[0])
