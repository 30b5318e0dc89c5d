"""Finished conversations read token by token and turn by turn: `score_transcripts`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from math import isnan
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.backend import Backend, TokenBatch
from persona_lens.backend.context import context_length
from persona_lens.backend.memory import forward_batches
from persona_lens.errors import PersonaLensError
from persona_lens.monitoring.conversation import TraitReading
from persona_lens.monitoring.encoding import EncodedTranscript, UnfollowedError, encode_one_by_one, encode_transcript
from persona_lens.monitoring.heatmap import Strip, TokenHeatmap
from persona_lens.monitoring.tokens import token_pieces
from persona_lens.monitoring.transcripts import BadTranscript, Transcript
from persona_lens.monitoring.watching import Panel
from persona_lens.notes import note

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from persona_lens.models import ChatFormat

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
    """

    encoded: EncodedTranscript
    panel: Panel
    values: Float[Tensor, "tokens gauges"]
    turns: tuple[TraitReading, ...]

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
        return TokenHeatmap(pieces, strips, title=f"Conversation {self.transcript.id}")

    def to_json(self, *, tokens: bool = False) -> dict[str, Any]:
        """The readings as JSON values, NaN as null; with ``tokens`` every token's values too."""
        found: dict[str, Any] = {
            "id": self.transcript.id,
            "line": self.transcript.line,
            "turns": [
                {name: None if isinstance(value, float) and isnan(value) else value for name, value in turn.items()}
                for turn in map(asdict, self.turns)
            ],
        }
        if tokens:
            found["gauges"] = list(map(str, self.panel.gauges))
            found["ids"] = list(self.encoded.ids)
            found["values"] = self.values.tolist()
        return found


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
    for gauge in panel.gauges if not allow_other_model else ():
        gauge.vectors.check_model(backend)
    limit = context_length(backend)
    rest = iter(transcripts)
    while several := list(islice(rest, LOOK_AHEAD)):
        encoded = [_encoded(each, chat, limit) for each in several]
        yield from _scored(backend, encoded, panel)


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
    backend: Backend, encoded: Sequence[EncodedTranscript | BadTranscript], panel: Panel
) -> Iterator[ScoredTranscript | BadTranscript]:
    values: dict[int, Tensor] = {}
    texts = [text for each in encoded if isinstance(each, EncodedTranscript) for text in each.texts]
    if texts:
        for rows, result in forward_batches(backend, TokenBatch.of(texts), [panel.read]):
            for row, projected in zip(rows, result.reads["projections"], strict=True):
                values[row] = panel.values(projected[:, -len(texts[row]) :]).clone()
    numbers = count()
    for each in encoded:
        if isinstance(each, BadTranscript):
            yield each
        else:
            own = torch.cat([values[number] for number in islice(numbers, len(each.starts))])
            yield ScoredTranscript(each, panel, own, _turns(each, panel, own))


def _turns(encoded: EncodedTranscript, panel: Panel, values: Tensor) -> tuple[TraitReading, ...]:
    answers = [message for message in encoded.messages if message.role == "assistant"]
    return tuple(
        TraitReading(
            turn=turn,
            trait=gauge.trait,
            layer=gauge.layer,
            tokens=len(said),
            mean=float(said.mean()) if len(said) else torch.nan,
            highest=float(said.max()) if len(said) else torch.nan,
            prompt_last=float(values[answer.prompt_stop - 1, number]) if answer.prompt_stop else torch.nan,
        )
        for turn, answer in enumerate(answers)
        for number, gauge in enumerate(panel.gauges)
        for said in [values[answer.start : answer.stop, number]]
    )
