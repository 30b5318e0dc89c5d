"""What a conversation has come to: how much its replies surprise the unsteered model, and what the model still knows.

Both are log-probabilities of parts of a text that is there: see `persona_lens.analysis.weighing`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from persona_lens.analysis.known_questions import SHOWN, Known, asked_of
from persona_lens.analysis.persistence.ways import EditsOf, Way
from persona_lens.analysis.weighing import Passage, Weighing
from persona_lens.backend import Backend, Edit
from persona_lens.data.turns import turn_prompt
from persona_lens.extraction.conversations import Conversation
from persona_lens.models import ChatFormat, Message
from persona_lens.models.chat import messages_of
from persona_lens.steering.steering import rowwise

_LAST: Message = {"role": "user", "content": "Thank you."}  # behind the last reply, so that its end can be found


# Surprise


def surprise(backend: Backend, chat: ChatFormat, conversations: Sequence[Conversation], name: str) -> Weighing:
    """Weighs every reply of finished conversations, under the unsteered model that has what was said before it.

    Conversations held under a system prompt are read without it, so that ways to steer are weighed alike.
    """
    passages = []
    for each in conversations:
        plain = replace(each, variant=replace(each.variant, system=None))
        found = turn_prompt(chat, [*plain.messages, _LAST])
        passages.append(Passage(found.ids[: found.said[-1][1]] if found.said else found.ids, found.said))
    return Weighing(backend, passages, [_purpose(each) for each in conversations], name)


def surprise_of(
    conversations: Sequence[Conversation], weighing: Weighing, found: Sequence[Sequence[float]]
) -> list[list[float | None]]:
    """-log p of each reply in nats a token, by conversation and turn; None for a reply of no tokens."""
    surprises = []
    for each, passage, logprobs in zip(conversations, weighing.passages, found, strict=True):
        there = [place for place, (_, reply) in enumerate(each.exchanges) if reply.strip()]
        values: list[float | None] = [None] * len(each.exchanges)
        if len(there) == len(logprobs):  # else the template leaves out some reply, and which one is not known
            for place, (start, stop), logprob in zip(there, passage.spans, logprobs, strict=True):
                values[place] = -logprob / (stop - start)
        surprises.append(values)
    return surprises


# Capability


def capability(
    backend: Backend,
    chat: ChatFormat,
    conversations: Sequence[Conversation],
    edits: EditsOf,
    count: int,
    seed: int,
    name: str,
) -> Weighing:
    """Weighs the right answers to known questions that are asked after what was said, as the way steers then.

    Each question stands with its right answer before the next, so that one pass weighs all of them.
    """
    passages = [_known_passage(chat, each, asked_of(each.number, count, seed)) for each in conversations]
    labels = [each.request("", seed).labels for each in conversations]

    def edited(batch: Sequence[int], width: int) -> list[Edit]:
        mask = torch.zeros(len(batch), width, dtype=torch.bool)
        for row, number in enumerate(batch):
            _mark(mask[row], passages[number])
        return [replace(edit, positions=mask) for edit in rowwise(edits(labels[number]) for number in batch)]

    purposes = [json.dumps([_purpose(each), count, seed]) for each in conversations]
    return Weighing(backend, passages, purposes, name, edited)


def _known_passage(chat: ChatFormat, conversation: Conversation, asked: Sequence[Known]) -> Passage:
    way = Way(conversation.variant.labels["way"])
    chain = list(_messages(asked))
    found = turn_prompt(chat, [*conversation.messages, *chain, _LAST])
    answers = found.said[-len(asked) :]
    ids = found.ids[: answers[-1][1]]
    past = turn_prompt(chat, [*conversation.messages, chain[0]]).past if way is Way.CLEAN_ALL else 0
    said = {Way.GENERATED: found.said, Way.CLEAN: answers}.get(way)
    edited = [range(past, len(ids))] if said is None else [range(start - 1, stop) for start, stop in said]
    return Passage(ids, answers[SHOWN:], tuple(edited))


def _mark(row: Bool[Tensor, " width"], passage: Passage) -> None:
    """Mark the tokens that are edited in a row of a batch that is padded on the left."""
    first = len(row) - len(passage.ids)
    for part in passage.edited:
        row[first + part.start : first + part.stop] = True


def _messages(asked: Sequence[Known]) -> Iterator[Message]:
    for each in asked:
        yield from messages_of(None, each.question)
        yield {"role": "assistant", "content": each.answer}


def known_length(chat: ChatFormat, number: int, count: int, seed: int) -> int:
    """Tokens of the questions that a conversation is asked, with their answers."""
    return len(chat.encode_messages(list(_messages(asked_of(number, count, seed))), add_generation_prompt=False))


def _purpose(conversation: Conversation) -> str:
    labels: Mapping[str, Any] = conversation.variant.labels
    return json.dumps([conversation.user.name, dict(labels), conversation.variant.system, conversation.exchanges])
