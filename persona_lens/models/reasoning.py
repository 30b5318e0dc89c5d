"""A response without its reasoning, where only its text is known, as of a model on somebody's server.

Where there are token ids, `persona_lens.backend.parts` tells the two apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from persona_lens.core.marks import CHANNEL, MARKS, Marks, channel_messages
from persona_lens.core.progress import note

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from persona_lens.backend.parts import Part, Parts

_FINAL = re.compile(r"<\|channel\|>final[^<]*<\|message\|>(.*?)(?=<\|(?:end|return|start|channel)\|>|\Z)", re.DOTALL)
THINKING, ANSWER = "thinking", "answer"
"""What the two parts of a response are called."""


def answer_text(text: str, opened: Marks | None = None) -> str:
    r"""Take the reasoning out of a response.

    Args:
        text: The response, special tokens included where the model marks its reasoning with them.
        opened: What sets the reasoning apart that the prompt ended in, so that the response begins in it, whether or
            not the model repeats the mark that opened it; None where it begins outside any.

    Returns:
        The answer. Empty if the model never came to one: an unclosed block is reasoning to its end. A text
        without marks comes back unchanged.

    >>> answer_text("<think>Greet them.</think>\n\nHello!")
    'Hello!'
    >>> answer_text("<think>Greet")
    ''
    """
    if CHANNEL in text:
        finals = _FINAL.findall(text)
        return str(finals[-1]).strip() if finals else ""
    blocks, opening, closing = _patterns(opened)
    left = text
    if opened:
        first = closing.search(text)
        if first is None:
            return ""
        left = text[first.end() :]
    left = blocks.sub("", left)
    closings = list(closing.finditer(left))
    if closings:
        left = left[closings[-1].end() :]
    unclosed = opening.search(left)
    if unclosed:
        left = left[: unclosed.start()]
    return text if left == text else left.strip()


def stretches(parts: Sequence[Part]) -> tuple[str, ...]:
    """For each token of a response ``thinking``, the marks around it included, or ``answer``; empty if nothing is."""
    from persona_lens.backend.parts import Part

    if Part.THINKING not in parts:
        return ()
    found = list(parts)
    for order in (range(1, len(parts)), range(len(parts) - 2, -1, -1)):  # what closes thinking, and what opens it
        for at in order:
            before = found[at - order.step]
            if found[at] is Part.NEITHER and before is Part.THINKING:
                found[at] = before
    return tuple(THINKING if part is Part.THINKING else ANSWER for part in found)


def unmarked(
    parts: Sequence[Part], ids: Sequence[int], marks: Sequence[Marks], decode: Callable[[Sequence[int]], str]
) -> tuple[Part, ...]:
    """The parts of a finished response, in which all tokens of a mark in several tokens belong to neither.

    Args:
        parts: As they were told token by token, when nobody could know yet that a mark had begun.
        ids: The response.
        marks: What sets thinking apart.
        decode: Text of token ids.
    """
    from persona_lens.backend.parts import Part

    found = list(parts)
    for end, part in enumerate(parts):
        before = parts[end - 1] if end else Part.NEITHER
        if part is not Part.NEITHER or before is Part.NEITHER:
            continue
        wanted = [pair[0 if before is Part.ANSWER else 1] for pair in marks]
        for start in range(end, max(end - max(map(len, wanted)) * 4, -1), -1):  # bytes of a character, at most
            whole, begun = decode(ids[start : end + 1]), decode(ids[start:end])
            if any(mark in whole and mark not in begun for mark in wanted):
                found[start:end] = [Part.NEITHER] * (end - start)
                break
    return tuple(found)


def in_channels(pieces: Sequence[bytes]) -> tuple[Part, ...]:
    """What tokens are in which the markup of gpt-oss is written as text; empty where the text begins otherwise.

    Args:
        pieces: What each token stands for. One that holds anything of the markup belongs to neither part.
    """
    from persona_lens.backend.parts import Part

    said = list(channel_messages(b"".join(pieces)))
    found, start = [], 0
    for piece in pieces:
        stop = start + len(piece)
        own = next((answer for begin, end, answer in said if begin <= start < stop <= end), None)
        found.append(Part.NEITHER if own is None else Part.ANSWER if own else Part.THINKING)
        start = stop
    return tuple(found) if said else ()


def closed(parts: Parts, prompt: Sequence[int]) -> list[int]:
    """A prompt with the thinking closed that it ends in, as it stands before an answer that is there already.

    Args:
        parts: Tell what the model's tokens are.
        prompt: Token ids.
    """
    return [*prompt, *parts.closing.get(parts.after(prompt), ())]


def note_unanswered(parts: Parts, answers: Sequence[str], ended: Sequence[bool | None]) -> None:
    """Say how many responses came to no answer, which look as if the model had nothing to say.

    Args:
        parts: Tell what its tokens are.
        answers: Their answers as text.
        ended: Whether the model ended each of them; None where that is not known.
    """
    cut = [end is False and not answer.strip() for answer, end in zip(answers, ended, strict=True)]
    if any(cut) and parts.thinks:
        which = "no response came to an answer" if all(cut) else "some responses came to no answer"
        note(  # without a number: runs of many rounds say it once
            f"{which}: the model was still thinking when its tokens ran out; allow for more (--max-new-tokens), or for "
            "less thinking (--thinking-budget)"
        )


def special_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Marks of reasoning that are control tokens of a model."""
    special = {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(mark for pair in MARKS for mark in pair if mark in special)


def answer_of(parts: Parts, state: int, ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> str:
    """The answer in a response's token ids; empty if the model never came to one.

    Args:
        parts: Tell what each token is.
        state: Where they stand at the end of the prompt.
        ids: The response.
        decode: Text of token ids.
    """
    from persona_lens.backend.parts import Part

    said: list[str] = []
    run: list[int] = []
    apart = marked = False
    for token in ids:
        state, part = parts.step(state, token)
        if part is Part.ANSWER:
            apart = apart or marked
            run.append(token)
            continue
        marked, apart = True, apart or part is Part.THINKING
        if run:
            said.append(_unmarked(decode(run), decode([*run, token]), parts.marks))
            run = []
    found = "".join((*said, decode(run)))
    return found.strip() if apart else found


def _unmarked(said: str, further: str, marks: Sequence[Marks]) -> str:
    """A text without the mark that goes on in the token behind it, where marks are written in several tokens."""
    whole = len(said.rstrip("\ufffd"))  # the bytes of a character that is not there yet
    places = ((further.rfind(opening), len(opening)) for opening, _ in marks)
    return said[: min((at for at, length in places if 0 <= at < whole < at + length), default=len(said))]


@lru_cache
def _patterns(opened: Marks | None) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """Whole blocks of reasoning, what opens one, and what closes one."""
    pairs = (*MARKS, opened) if opened else MARKS
    blocks = "|".join(f"{re.escape(begin)}.*?{re.escape(end)}" for begin, end in pairs)
    opening, closing = ("|".join(re.escape(pair[side]) for pair in pairs) for side in (0, 1))
    return re.compile(blocks, re.DOTALL), re.compile(opening), re.compile(closing)
