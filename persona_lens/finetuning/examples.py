"""`Example`: a conversation as a model is trained on it, with the loss on what the assistant says only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from persona_lens.backend.parts import Part
from persona_lens.backend.tokens import TokenIds
from persona_lens.data.datasets import open_dataset
from persona_lens.data.encoding import encode_one_by_one, encode_transcript
from persona_lens.data.tables import DataError
from persona_lens.data.transcripts import TEXT_SUFFIXES, BadTranscript, Transcript, is_counted, open_transcripts
from persona_lens.finetuning.config import FinetuningError
from persona_lens.models import ChatFormat, ModelError

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """Token ids of a conversation, or of a part of it that ends with an answer.

    Attributes:
        ids: All tokens.
        learned: For each token whether it is the assistant's, ends of its turns included: the loss is on these.
    """

    ids: TokenIds
    learned: tuple[bool, ...]


@dataclass(frozen=True)
class Examples:
    """What a model is trained on.

    Attributes:
        rows: The examples, in the order of the data.
        conversations: How many conversations they come from.
        shortened: How many examples were cut at the length limit.
        dropped: How many had nothing to learn before the length limit.
    """

    rows: tuple[Example, ...]
    conversations: int
    shortened: int
    dropped: int

    @property
    def learned_tokens(self) -> int:
        """Tokens that the loss is on."""
        return sum(map(sum, (row.learned for row in self.rows)))

    def to_json(self) -> dict[str, int]:
        """The counts by name."""
        counts = {"conversations": self.conversations, "examples": len(self.rows), "shortened": self.shortened}
        return {**counts, "dropped": self.dropped, "learned_tokens": self.learned_tokens}


def read_conversations(data: Path | str, side: str | None = None) -> list[Transcript]:
    """Every conversation of a dataset: anything that `persona_lens.data.datasets.open_dataset` reads, or plain text.

    A conversation ends with its last answer: what the user says behind it teaches nothing. Neither does an answer of
    weight 0.

    Args:
        data: The dataset.
        side: Of preference pairs: ``chosen`` or ``rejected``.

    Raises:
        DataError, MonitoringError, ScreeningError: If there is no such dataset, or it has no form that is known.
        FinetuningError: If a row cannot be read, or has no answer to learn; with file and line.
    """
    found = list(_plain(data) if Path(data).suffix.lower() in TEXT_SUFFIXES else _rows(data, side))
    for transcript in found:
        check_answered(transcript)
    return found


def _plain(file: Path | str) -> Iterator[Transcript]:
    for transcript in open_transcripts(file):
        if isinstance(transcript, BadTranscript):
            raise transcript.error
        yield transcript


def _rows(data: Path | str, side: str | None) -> Iterator[Transcript]:
    dataset = open_dataset(data, side=side)
    for row in dataset:
        if row.messages is None:
            raise FinetuningError(f"{row.problem}; mend the row, or leave it out")
        yield Transcript(row.messages, row.id, row.line, dataset.name)


def check_answered(transcript: Transcript) -> None:
    """Raise `FinetuningError` unless something can be learned from a conversation."""
    answers = [message["content"] for message in transcript.messages[1:] if is_counted(message)]
    if not any(answer.strip() for answer in answers):
        raise FinetuningError(f"{transcript.place}: the conversation has no answer of the assistant to learn")


def encode_examples(
    transcripts: Iterable[Transcript], chat: ChatFormat, max_length: int, *, answers_only: bool = False
) -> Examples:
    """Encode conversations for training.

    Where the chat template marks the assistant's tokens itself (``{% generation %}``) its mask is taken. Elsewhere each
    answer's tokens are found by their ids, as `persona_lens.data.encoding.encode_transcript` finds them, and its end of
    turn with them. A template that changes earlier turns, or cannot be followed, gives one example for each answer: the
    prompt as the model is given it, and the answer behind it.

    Args:
        transcripts: The conversations.
        chat: The model's chat format.
        max_length: Tokens of an example at most.
        answers_only: Learn no reasoning before an answer, nor its marks, but read it; of one that never came to an
            answer nothing.

    Raises:
        FinetuningError: If there are none, or nothing can be learned from any within the length limit.
        ModelError: If the template refuses a conversation.
    """
    ends = frozenset(chat.end_of_turn_ids())
    rows: list[Example] = []
    conversations = shortened = dropped = 0
    for transcript in transcripts:
        conversations += 1
        for example in _encoded(transcript, chat, ends):
            if answers_only:
                example = _of_answers(example, chat, ends)
            kept = Example(example.ids[:max_length], example.learned[:max_length])
            shortened += len(kept.ids) < len(example.ids) and any(kept.learned)
            dropped += not any(kept.learned)
            rows += [kept] if any(kept.learned) else []
    if not conversations:
        raise FinetuningError("there are no conversations to learn from")
    if not rows:
        also = ", or learn the thinking too: some came to no answer" if answers_only else ""
        raise FinetuningError(
            f"all {conversations} conversations have nothing to learn in their first {max_length} tokens; raise "
            f"max_length{also}"
        )
    return Examples(tuple(rows), conversations, shortened, dropped)


def _encoded(transcript: Transcript, chat: ChatFormat, ends: frozenset[int]) -> Iterator[Example]:
    try:
        every = all(is_counted(message) for message in transcript.messages if message["role"] == "assistant")
        marked = chat.encode_marked(transcript.messages) if every else None
        if marked is not None:
            yield Example(*marked)
            return
        yield _whole(transcript, chat, ends)
        return
    except ModelError as error:
        raise ModelError(f"{transcript.place}: {error}") from error
    except DataError:  # the conversation as a whole cannot be followed; its answers one by one can
        pass
    end = tuple(chat.closing_ids())
    encoded = encode_one_by_one(transcript, chat)
    pairs = zip(encoded.messages, transcript.messages, strict=True)
    answers = [(message, given) for message, given in pairs if message.prompt_stop is not None]
    for begin, ids, (message, given) in zip(encoded.starts, encoded.texts, answers, strict=True):
        if is_counted(given):
            prompt = message.start - begin
            yield Example((*ids, *end), (False,) * prompt + (True,) * (len(ids) + len(end) - prompt))


def _whole(transcript: Transcript, chat: ChatFormat, ends: frozenset[int]) -> Example:
    encoded = encode_transcript(transcript, chat)
    learned = [False] * len(encoded.ids)
    for message, given in zip(encoded.messages, transcript.messages, strict=True):
        if is_counted(given):
            # A turn's end is learned with it; what the template writes after that is not the model's to say.
            closed = message.stop < len(learned) and encoded.ids[message.stop] in ends
            for place in range(message.start, message.stop + closed):
                learned[place] = True
    return Example(encoded.ids, tuple(learned))


def _of_answers(example: Example, chat: ChatFormat, ends: frozenset[int]) -> Example:
    """An example of which answers and their ends are learned alone; to end while thinking is not."""
    ids, learned = example.ids, list(example.learned)
    place = 0
    for own, run in groupby(example.learned):
        start, place = place, place + len(list(run))
        if own:
            parts = chat.parts_of_text(ids[:start], ids[start:place])
            answers = Part.ANSWER in parts
            for at, part in enumerate(parts, start):
                learned[at] = part is Part.ANSWER or (answers and ids[at] in ends)
    return Example(ids, tuple(learned))


def in_system(transcripts: Sequence[Transcript], prompts: Sequence[str]) -> list[Transcript]:
    """The conversations with system prompts in turn, each before what the conversation's own says."""
    placed = []
    for number, transcript in enumerate(transcripts):
        text, messages = prompts[number % len(prompts)], transcript.messages
        if messages[0]["role"] == "system":
            text, messages = f"{text}\n\n{messages[0]['content']}", messages[1:]
        system = {"role": "system", "content": text}
        placed.append(Transcript((system, *messages), transcript.id, transcript.line, transcript.file))
    return placed


def collate(rows: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch as causal language models take it, padded on the right, where attention never sees the padding."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    attention = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for number, row in enumerate(rows):
        length = len(row.ids)
        ids[number, :length] = torch.tensor(row.ids)
        attention[number, :length] = 1
        labels[number, :length] = torch.where(torch.tensor(row.learned), torch.tensor(row.ids), IGNORED)
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def fingerprint(transcripts: Sequence[Transcript]) -> str:
    """SHA-256 over the messages, for a run's configuration."""
    content = "".join(json.dumps(list(map(dict, t.messages))) + "\n" for t in transcripts)
    return "sha256:" + hashlib.sha256(content.encode()).hexdigest()
