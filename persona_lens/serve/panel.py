"""What the server tells of its vectors, of a steering, and of a conversation that is there already."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from persona_lens.backend.batches import context_length
from persona_lens.data.pieces import token_pieces
from persona_lens.models import Message
from persona_lens.monitoring import ConversationMonitor, Panel
from persona_lens.serve.answers import gauges_told, numbers
from persona_lens.serve.workbench import TooLongError, Workbench
from persona_lens.steering import Steering
from persona_lens.steering.history import DEFAULT_HISTORY, History, check_history, turn_prompt
from persona_lens.steering.preview import preview_tokens
from persona_lens.vectors import PersonaVectors, VectorsError

PREVIEWED = 8  # tokens of a response to come, beyond which a preview repeats itself
LONGEST = 4096  # tokens of a previewed prompt: each is a row of a table, whose drawing holds up whoever else is served


def vectors_shown(workbench: Workbench) -> dict[str, Any]:
    """The model, and what is known of each of its vectors."""
    info, shelf = workbench.backend.info, workbench.shelf
    model = {
        "name": info.model,
        "n_layers": info.n_layers,
        "d_model": info.d_model,
        "dtype": info.dtype,
        "backend": info.backend,
        "thinks": workbench.thinks,
    }
    gauges = shelf.gauges()
    shown = [
        _vectors_shown(name, each, [gauge.layer for gauge in gauges if gauge.trait == name], name in shelf.brought)
        for name, each in shelf.vectors.items()
    ]
    told = {"gauges": gauges_told(gauges), "vectors": shown, "rows": workbench.rows}
    return {"model": model, **told, "history": DEFAULT_HISTORY}


def _vectors_shown(name: str, vectors: PersonaVectors, layers: Sequence[int], brought: bool) -> dict[str, Any]:
    stored = vectors.baseline
    baseline = None if stored is None else {str(at): {"mean": b.mean, "sd": b.sd} for at, b in stored.layers.items()}
    try:
        trait = vectors.trait_definition
        described: dict[str, Any] = {"label": trait.name, "description": trait.description}
    except VectorsError:
        described = {"label": name, "description": ""}
    return {
        "name": name,
        **described,
        "layers": list(layers),
        "norms": numbers(vectors.norms()),
        **_strengths_shown(vectors),
        "baseline": baseline,
        "monitor": vectors.monitor is not None,
        "removable": brought,
    }


def _strengths_shown(vectors: PersonaVectors) -> dict[str, Any]:
    """The strength that was tuned, also as a share of the residual's length, and the one at which text breaks."""
    if (tuned := vectors.tuned) is None:
        return {"tuned": None, "cliff": None}
    found = vectors.provenance["tuned"]
    sign = math.copysign(1.0, tuned.coefficient)
    strength, cliff = (
        sign * abs(value) if isinstance(value := found.get(name), int | float) else None
        for name in ("strength", "cliff")
    )
    return {
        "tuned": {"layer": tuned.layer, "coefficient": tuned.coefficient, "relative": strength},
        "cliff": cliff,
    }


def steering_shown(
    workbench: Workbench, edits: str, messages: Sequence[Message] | None, history: History | None = None
) -> dict[str, Any]:
    """A steering in its canonical notation, and what it does to which tokens of a prompt.

    Args:
        workbench: The model and its vectors.
        edits: The steering's notation, or the name of a preset.
        messages: What the prompt is made of; None for a few words.
        history: What the edits do to finished turns: whether they can is looked at even where there are none yet. None
            is the usual one.

    Raises:
        TooLongError: If the prompt is longer than the model or a preview takes.
        PersonaLensError: If it is none.
    """
    steering = workbench.shelf.steering(edits)
    if steering is None:
        return {"edits": "", "terms": [], "preview": ""}
    if history is not None:
        check_history(steering, history)
    asked = messages or [{"role": "user", "content": "Hello"}]
    prompt = workbench.encode(asked)
    most = min(context_length(workbench.backend) or LONGEST, LONGEST)
    if len(prompt) > most:
        raise TooLongError(f"the prompt has {len(prompt)} tokens, and a preview shows up to {most} here; shorten it")
    turn = turn_prompt(workbench.chat, asked)
    past = DEFAULT_HISTORY if history is None else history
    preview = preview_tokens(workbench.backend, turn, PREVIEWED, edits=steering, history=past)
    return {"edits": str(steering), "terms": list(map(str, steering.terms)), "preview": str(preview)}


def read_conversation(
    workbench: Workbench,
    panel: Panel,
    messages: Sequence[Message],
    steering: Steering | None,
    history: History = DEFAULT_HISTORY,
) -> dict[str, Any]:
    """The readings of every turn of the assistant, with its tokens.

    Raises:
        PersonaLensError: If they are no conversation, or too long.
    """
    # Whether the vectors may be used on this model, the shelf has looked.
    monitor = ConversationMonitor(workbench.backend, panel, chat=workbench.chat, allow_other_model=True)
    turns = monitor.observe(messages, steering.edits() if steering is not None else (), history=history)
    told = []
    for turn in turns:
        values = turn.token_values
        assert values is not None  # they are kept
        pieces = token_pieces(workbench.backend.tokenizer, workbench.chat.encode_answer(turn.text))
        told.append(
            {
                "turn": turn.number,
                "message": turn.message,
                "readings": [reading.to_json() for reading in turn.readings],
                "tokens": [{"text": piece.text, "values": numbers(values[piece.stop - 1])} for piece in pieces],
            }
        )
    return {"gauges": gauges_told(panel.gauges), "turns": told}
