"""`TurnPrompt`: the prompt of one turn of a conversation, with what of it belongs to the turns before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from persona_lens.models import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from persona_lens.backend.parts import Part
    from persona_lens.backend.tokens import TokenIds
    from persona_lens.models import ChatFormat, Message

# Texts that begin and end in other ways than each other, so that whatever a message holds, one of them differs from
# it in its first token and one in its last.
_PROBES = ("zebra kettle", "walnut ladder")
_LETTERS = "QZXJKVWqzxjkvw"  # rare ones first


@dataclass(frozen=True)
class TurnPrompt:
    """The prompt of a turn: everything that the model has before it when it begins to answer.

    Attributes:
        ids: Token ids of the whole prompt.
        past: How many of them, from the first, belong to finished turns: up to the assistant's last reply and what the
            template ends it with. 0 in the first turn.
        said: First token of each earlier reply of the assistant and the one behind its last, in order.
        tokenizer: The model's, to tell which tokens of these replies are thinking; None for a model that never thinks.
    """

    ids: TokenIds
    past: int = 0
    said: tuple[tuple[int, int], ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, compare=False, repr=False)

    @cached_property
    def parts(self) -> tuple[tuple[Part, ...], ...]:
        """What each token of each earlier reply is, thinking or answer."""
        from persona_lens.backend.parts import Parts

        parts = Parts() if self.tokenizer is None else Parts.of(self.tokenizer)
        return tuple(parts.of_response(self.ids[:start], self.ids[start:stop]) for start, stop in self.said)


def turn_prompt(chat: ChatFormat, messages: Sequence[Message], *, replies: bool = True) -> TurnPrompt:
    """The prompt that asks for the next reply of a conversation.

    Earlier replies are found in the token ids: each is where the ids change when the template is given another text in
    its place. So they are found whatever a template makes of them; one that it leaves out, or of which it leaves
    nothing, is not among them.

    Args:
        chat: The model's chat format.
        messages: The conversation, which ends with what is to be answered.
        replies: Find every earlier reply, for each of which the template writes the conversation once or twice; else
            what is over is found, and ``said`` has the last reply alone.

    Raises:
        ModelError: The messages are malformed, or the template refuses them.
    """
    ids = tuple(chat.encode_messages(messages))
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [_span(chat, messages, place, ids) for place in (places if replies else places[-1:])]
    past = 0
    if places:
        _, past = spans[-1]
        past += _common(ids[past:], _ending(chat, messages[: places[-1] + 1]))
    return TurnPrompt(ids, past, tuple((start, stop) for start, stop in spans if start < stop), chat.tokenizer)


def _ending(chat: ChatFormat, finished: Sequence[Message]) -> TokenIds:
    """What the template writes behind the last message of finished turns."""
    try:
        ids = tuple(chat.encode_messages(finished, add_generation_prompt=False))
        _, stop = _span(chat, finished, len(finished) - 1, ids, add_generation_prompt=False)
    except ModelError:  # some refuse a conversation that does not end with a question
        return ()
    return ids[stop:]


def _span(
    chat: ChatFormat, messages: Sequence[Message], place: int, ids: TokenIds, add_generation_prompt: bool = True
) -> tuple[int, int]:
    """First token of a message's content, and the one behind its last."""
    content = messages[place]["content"]
    absent = next((letter for letter in _LETTERS if letter not in content), None)
    before, behind = len(ids), len(ids)
    for probe in _PROBES if absent is None else (absent * 3,):  # of that letter one text is enough
        other = [*messages[:place], {**messages[place], "content": probe}, *messages[place + 1 :]]
        probed = tuple(chat.encode_messages(other, add_generation_prompt=add_generation_prompt))
        before = min(before, _common(ids, probed))
        behind = min(behind, _common(ids[::-1], probed[::-1]))
    return before, max(before, len(ids) - behind)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
