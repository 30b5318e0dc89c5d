"""Prompts and finished conversations, projected on traits: `prompt_projections`, `monitor`, `score_transcripts`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.backend import Backend, Read, ReadKind, TokenBatch
from persona_lens.backend.batches import context_length, forward_batches, forward_plan
from persona_lens.core.documents import plain
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.marks import may_hold_marks
from persona_lens.core.progress import Progress, note, shown_progress
from persona_lens.core.statistics import bootstrap_mean
from persona_lens.data.encoding import EncodedTranscript, UnfollowedError, encode_one_by_one, encode_transcript
from persona_lens.data.pieces import token_pieces
from persona_lens.data.tables import DataError
from persona_lens.data.transcripts import BadTranscript, Transcript, messages_of, open_transcripts
from persona_lens.models import Message
from persona_lens.models.chat import chat_format
from persona_lens.monitoring.gauges import Gauge, MonitoringError, Panel, TraitReading, projected
from persona_lens.monitoring.heatmap import TokenHeatmap
from persona_lens.monitoring.markup import Strip
from persona_lens.reports.result import Result
from persona_lens.runs import RunFolder
from persona_lens.runs.chunks import Pieces, Row
from persona_lens.runs.cost import Work, reading_work
from persona_lens.vectors import OWN_REDUCTION, PersonaVectors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from persona_lens.models import ChatFormat

PROJECTIONS = "projections.jsonl"


def prompt_projections(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    vectors: Sequence[PersonaVectors],
    layers: Sequence[int],
    *,
    reduction: str = OWN_REDUCTION,
    allow_other_model: bool = False,
) -> Float[Tensor, "prompts traits layers"]:
    """Project the last token of every prompt on every trait, before anything is generated (method, section 5).

    Prompts run in batches of like length, up to the deepest layer that is asked for.

    Args:
        backend: The model.
        prompts: Token ids as `ChatFormat.encode` gives them, up to where the model begins to answer.
        vectors: One trait or more.
        layers: Block indices, 0-based.
        reduction: Which of the vectors.
        allow_other_model: Read a model that the vectors were not extracted from.

    Returns:
        Projections on the unit vectors in residual-stream units, float32, in the order of the arguments.

    Raises:
        MonitoringError: If no vectors or no layers are given.
        TokenError: If there are no prompts, or one is empty.
        VectorsError: If there is no such layer or reduction, a vector is zero, or vectors belong to another model.
    """
    if not vectors or not layers:
        raise MonitoringError("give vectors to project on, and layers to read: there are none")
    gauges = [Gauge(each, layer, reduction) for each in vectors for layer in layers]
    found = gauge_projections(backend, prompts, gauges, allow_other_model=allow_other_model)
    return found.reshape(-1, len(vectors), len(layers))


def gauge_projections(
    backend: Backend, prompts: Sequence[Sequence[int]], gauges: Sequence[Gauge], *, allow_other_model: bool = False
) -> Float[Tensor, "prompts gauges"]:
    """`prompt_projections` at any gauges, in one pass."""
    for gauge in gauges if not allow_other_model else ():
        gauge.vectors.check_model(backend)
    layers = sorted({gauge.layer for gauge in gauges})
    tokens = TokenBatch.of(prompts)
    found = torch.empty(len(tokens), len(gauges))
    for rows, result in forward_batches(backend, tokens, [Read(ReadKind.PROMPT_LAST, tuple(layers))]):
        found[rows] = projected(result.reads[ReadKind.PROMPT_LAST.value], layers, gauges)
    return found


def projections_work(backend: Backend, prompts: Sequence[Sequence[int]], layers: Sequence[int]) -> Work:
    """What `prompt_projections` would ask of the model; nothing runs."""
    tokens, reads = TokenBatch.of(prompts), [Read(ReadKind.PROMPT_LAST, tuple(layers))]
    passes = (tokens.chosen(rows) for rows in forward_plan(backend, tokens, (), reads))
    return reading_work("reading prompts", backend, passes, reads)


def kept_projections(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    vectors: PersonaVectors,
    layers: Sequence[int],
    texts: Sequence[str],
    folder: RunFolder | None,
    prefix: str,
    *,
    reduction: str = OWN_REDUCTION,
) -> Float[Tensor, "prompts layers"]:
    """`prompt_projections` on one trait in any model, kept in a run folder and read from there by the next call.

    Args:
        backend: The model.
        prompts: Token ids.
        vectors: The trait.
        layers: Block indices, 0-based.
        texts: What each prompt asks.
        folder: Where to keep them; None keeps nothing.
        prefix: What the file's name begins with.
        reduction: Which of the vectors.
    """

    def work(_: int) -> list[Row]:
        found = prompt_projections(backend, prompts, [vectors], layers, reduction=reduction, allow_other_model=True)
        return [{"question": text, "projections": row.tolist()} for text, row in zip(texts, found[:, 0], strict=True)]

    purposes = [json.dumps([text, list(prompt)]) for text, prompt in zip(texts, prompts, strict=True)]

    def read(row: Row) -> list[float]:
        found = list(map(float, row["projections"]))
        if len(found) != len(layers):
            raise ValueError("of other layers")
        return found

    pieces = Pieces(folder, prefix + PROJECTIONS, [range(len(prompts))], purposes, form=read)
    return torch.tensor(list(map(read, pieces.run(work))))


ONE_BY_ONE = (
    "the chat template changes earlier turns of some conversations: their answers are read after their own prompts"
)
LOOK_AHEAD = 64  # conversations that are encoded before the first of them is read, so that those of like length meet


@dataclass(frozen=True, eq=False)
class ScoredTranscript:
    """A conversation with its values.

    Attributes:
        encoded: The conversation as token ids.
        panel: What was read.
        values: float32 [tokens, gauges], in residual-stream units.
        turns: One reading for each of the assistant's messages and gauge, in that order.
        parts: For each token of answers that begin with thinking ``thinking`` or ``answer``, else an empty text; none
            at all without such answers.
    """

    encoded: EncodedTranscript
    panel: Panel
    values: Float[Tensor, "tokens gauges"]
    turns: tuple[TraitReading, ...]
    parts: tuple[str, ...] = ()

    @property
    def transcript(self) -> Transcript:
        """The conversation."""
        return self.encoded.transcript

    def heatmap(self, tokenizer: PreTrainedTokenizerBase) -> TokenHeatmap:
        """The conversation's tokens coloured by their values, a strip for each gauge.

        The first token is left without a value: in most models its residual is of another size than all others. Where
        answers were read one by one, each stands behind its own prompt.
        """
        values = self.values.clone()
        values[list(self.encoded.starts)] = torch.nan
        traits = list(dict.fromkeys(gauge.trait for gauge in self.panel.gauges))
        order = sorted(enumerate(self.panel.gauges), key=lambda each: (traits.index(each[1].trait), each[1].layer))
        strips = tuple(Strip(tuple(values[:, n].tolist()), gauge.trait, gauge.layer) for n, gauge in order)
        pieces = token_pieces(tokenizer, self.encoded.ids)
        return TokenHeatmap(pieces, strips, title=f"Conversation {self.transcript.id}", parts=self.parts)

    def to_json(self, *, tokens: bool = False) -> dict[str, Any]:
        """The readings as JSON values, NaN as null; with ``tokens`` every token's values too."""
        found: dict[str, Any] = {
            "id": self.transcript.id,
            "line": self.transcript.line,
            "turns": [turn.to_json() for turn in self.turns],
        }
        if tokens:
            found["gauges"] = list(map(str, self.panel.gauges))
            found["ids"] = list(self.encoded.ids)
            found["values"] = self.values.tolist()
        return found


@dataclass(frozen=True, repr=False, eq=False)
class Monitored(Result):
    """Conversations that were read; a row for each of the assistant's turns and gauge.

    Attributes:
        conversations: Those that were read.
        summary: See `Result`.
    """

    kind = "monitor"
    folder = None
    conversations: tuple[ScoredTranscript, ...]
    summary: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """See `Result.rows`."""
        return [{"id": each.transcript.id, **turn.to_json()} for each in self.conversations for turn in each.turns]


def monitor(
    backend: Backend,
    conversations: Path | str | Iterable[Transcript | BadTranscript | Sequence[Message]],
    vectors: PersonaVectors | Iterable[PersonaVectors],
    layers: int | Sequence[int] | None = None,
    *,
    chat: ChatFormat | None = None,
    allow_other_model: bool = False,
    progress: Progress = shown_progress,
) -> Monitored:
    """Read traits off conversations that are over; all of them are kept in memory.

    Args:
        backend: The model.
        conversations: A file of them (`persona_lens.data.transcripts.open_transcripts`), or conversations, each a list
            of ``{"role", "content"}``.
        vectors: What is read.
        layers: Where; by default where each was tuned.
        chat: Chat format; the model's own by default.
        allow_other_model: Use vectors that belong to another model.
        progress: Told how far the work is.

    Raises:
        DataError: If the file cannot be read.
        MonitoringError: If no conversation can be read.
        VectorsError: If vectors belong to another model, or nothing was tuned.
    """
    if isinstance(conversations, Path | str):
        given: Iterable[Any] = open_transcripts(conversations)
    else:
        given = (_transcript(each, line) for line, each in enumerate(conversations, start=1))
    panel, found, problems = Panel.of(vectors, layers), [], []
    for each in score_transcripts(
        backend, given, panel, chat or chat_format(backend), allow_other_model=allow_other_model
    ):
        if isinstance(each, ScoredTranscript):
            found.append(each)
        else:
            problems.append(each.problem)
        progress(len(found) + len(problems), None, "conversations")
    if not found:
        raise MonitoringError(f"no conversation can be read: {problems[0] if problems else 'there is none'}")
    means = {str(gauge): _mean_of_turns(found, number) for number, gauge in enumerate(panel.gauges)}
    summary = {"conversations": len(found), "not_read": problems, "gauges": means, "model": asdict(backend.info)}
    return Monitored(tuple(found), plain(summary))


def _transcript(given: Transcript | BadTranscript | Sequence[Message], line: int) -> Transcript | BadTranscript:
    if isinstance(given, Transcript | BadTranscript):
        return given
    try:
        return Transcript(messages_of({"messages": list(given)}, "openai"), str(line), line, "conversation")
    except DataError as error:
        return BadTranscript(line, f"conversation {line}: {error}")


def _mean_of_turns(found: Sequence[ScoredTranscript], gauge: int) -> dict[str, Any] | None:
    """The mean of the replies' means, of their answers where they hold thinking, over conversations."""
    turns = (each.turns[gauge :: len(each.panel.gauges)] for each in found)
    own = [[turn.answered for turn in each if isfinite(turn.answered)] for each in turns]
    means = [fmean(each) for each in own if each]
    return bootstrap_mean(means).to_json() if means else None


def score_transcripts(
    backend: Backend,
    transcripts: Iterable[Transcript | BadTranscript],
    panel: Panel,
    chat: ChatFormat,
    *,
    allow_other_model: bool = False,
) -> Iterator[ScoredTranscript | BadTranscript]:
    """Read conversations in one forward pass each, several at a time; memory does not grow with their number.

    Where the chat template changes earlier turns, or cannot be followed, each answer is read after its own prompt.

    Args:
        backend: The model.
        transcripts: What `open_transcripts` reads; bad ones are handed on.
        panel: What is read.
        chat: Chat format.
        allow_other_model: Use vectors that belong to another model.

    Yields:
        For every conversation, in their order, its values; or why there are none: it cannot be read, its messages
        cannot be found in the template, or it is longer than the model takes.

    Raises:
        VectorsError: If vectors belong to another model.
    """
    panel.check_model(backend, allow_other_model=allow_other_model)
    limit = context_length(backend)
    rest = iter(transcripts)
    while several := list(islice(rest, LOOK_AHEAD)):
        encoded = [_encoded(each, chat, limit) for each in several]
        yield from _scored(backend, encoded, panel, chat)


def _encoded(
    transcript: Transcript | BadTranscript, chat: ChatFormat, limit: int | None
) -> EncodedTranscript | BadTranscript:
    if isinstance(transcript, BadTranscript):
        return transcript
    try:
        try:
            encoded = encode_transcript(transcript, chat)
        except UnfollowedError:
            encoded = encode_one_by_one(transcript, chat)
            note(ONE_BY_ONE)
    except PersonaLensError as error:
        said = str(error)
        where = "" if said.startswith(transcript.place) else f"{transcript.place}: "
        return BadTranscript(transcript.line, where + said)
    longest = max(map(len, encoded.texts))
    if limit is not None and longest > limit:
        problem = f"{transcript.place}: {longest} tokens, and the model takes {limit}; cut the conversation"
        return BadTranscript(transcript.line, problem)
    return encoded


def _scored(
    backend: Backend, encoded: Sequence[EncodedTranscript | BadTranscript], panel: Panel, chat: ChatFormat
) -> Iterator[ScoredTranscript | BadTranscript]:
    values: dict[int, Tensor] = {}
    texts = [text for each in encoded if isinstance(each, EncodedTranscript) for text in each.texts]
    if texts:
        for rows, result in forward_batches(backend, TokenBatch.of(texts), [panel.read]):
            for row, read in zip(rows, result.reads["projections"], strict=True):
                values[row] = panel.values(read[:, -len(texts[row]) :]).clone()
    numbers = count()
    for each in encoded:
        if isinstance(each, BadTranscript):
            yield each
        else:
            own = torch.cat([values[number] for number in islice(numbers, len(each.starts))])
            parts = _parts(each, chat)
            yield ScoredTranscript(each, panel, own, tuple(_turns(each, panel, own, parts)), parts)


def _parts(encoded: EncodedTranscript, chat: ChatFormat) -> tuple[str, ...]:
    """For each token of answers that begin with thinking which of the two it is, and nothing of others."""
    if not any(may_hold_marks(each["content"]) for each in encoded.transcript.messages):
        return ()
    found = [""] * len(encoded.ids)
    for message in encoded.messages:
        if message.role == "assistant" and message.stop > message.start:
            begin = max(start for start in encoded.starts if start <= message.start)
            behind = message.prompt_stop or message.start
            told = chat.stretches(encoded.ids[begin:behind], encoded.ids[behind : message.stop], of_others=True)
            for at, part in enumerate(told, behind):
                found[at] = part if at >= message.start else ""
    return tuple(found) if any(found) else ()


def _turns(encoded: EncodedTranscript, panel: Panel, values: Tensor, parts: Sequence[str]) -> Iterator[TraitReading]:
    answers = [message for message in encoded.messages if message.role == "assistant"]
    unknown = torch.full((len(panel.gauges),), torch.nan)
    for turn, answer in enumerate(answers):
        before = values[answer.prompt_stop - 1] if answer.prompt_stop else unknown
        own = parts[answer.start : answer.stop]
        yield from panel.readings(turn, values[answer.start : answer.stop], before, own if any(own) else ())
