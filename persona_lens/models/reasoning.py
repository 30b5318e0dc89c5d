"""The marks that set a model's reasoning apart, and its answer without it."""

from __future__ import annotations

import re
from functools import lru_cache

Marks = tuple[str, str]
"""What opens reasoning, and what closes it."""

# By family: DeepSeek, Qwen and most others; Seed; Magistral; Gemma 4; Kimi; Granite and others; Cohere.
_MARKS: tuple[Marks, ...] = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought", "<channel|>"),
    ("◁think▷", "◁/think▷"),
    ("<reasoning>", "</reasoning>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
# Marks that no list has: whatever tag a template leaves open at the end of a prompt, and what closes such a tag.
_TAGS = (
    (re.compile(r"<(?P<name>[^<>/|\s][^<>|\n]*)>"), "</{}>"),
    (re.compile(r"\[(?P<name>[A-Z_]+)\]"), "[/{}]"),
    (re.compile(r"◁(?P<name>[^◁▷/]+)▷"), "◁/{}▷"),
    (re.compile(r"<\|(?:START|start|begin)_(?:of_)?(?P<name>\w+)\|>"), None),
    (re.compile(r"<\|(?P<name>\w+)_(?:start|begin)\|>"), None),
)
# gpt-oss writes every message into a channel; only the one called "final" is for the user.
CHANNEL = "<|channel|>"
REASONING_TOKENS = frozenset(
    {*(mark for pair in _MARKS for mark in pair), CHANNEL, "<|start|>", "<|message|>", "<|constrain|>", "<|end|>"}
)
"""Tokens within a response that set reasoning apart; in some models they are control tokens."""
_FINAL = re.compile(r"<\|channel\|>final[^<]*<\|message\|>(.*?)(?=<\|(?:end|return|start|channel)\|>|\Z)", re.DOTALL)


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


def opened_marks(prompt_end: str, finished: str = "") -> Marks | None:
    """What a prompt's last part opens and does not close: the marks of the reasoning that the model begins in.

    Args:
        prompt_end: What the template writes between a question and what the model is to say.
        finished: What it writes between a question and an answer that is there; a tag that is open in both is the head
            of a turn, not reasoning.

    Returns:
        What opens the reasoning and what closes it; None where no reasoning is open.
    """
    head, _, begun = prompt_end.rpartition(CHANNEL)
    if begun and head and not begun.startswith("final"):
        return CHANNEL + begun, CHANNEL + "final"
    return next((marks for marks in _open_in(prompt_end) if marks not in _open_in(finished)), None)


def _open_in(text: str) -> list[Marks]:
    """Marks that are open at the end of a text, the last first."""
    found = [(match.end(), marks) for marks in _MARKS for match in re.finditer(re.escape(marks[0]), text)]
    for tag, closing in _TAGS:
        for match in tag.finditer(text):
            opened = match[0]
            found.append((match.end(), (opened, closing.format(match["name"]) if closing else _ending(opened))))
    left = (each for each in sorted(found, key=lambda each: -each[0]) if each[1][1] not in text[each[0] :])
    return [marks for _, marks in left]


def _ending(opened: str) -> str:
    pairs = (("START_", "END_"), ("start_", "end_"), ("begin_", "end_"), ("_start", "_end"), ("_begin", "_end"))
    return next(opened.replace(begin, end) for begin, end in pairs if begin in opened)


@lru_cache
def _patterns(opened: Marks | None) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """Whole blocks of reasoning, what opens one, and what closes one."""
    pairs = (*_MARKS, opened) if opened else _MARKS
    blocks = "|".join(f"{re.escape(begin)}.*?{re.escape(end)}" for begin, end in pairs)
    opening, closing = ("|".join(re.escape(pair[side]) for pair in pairs) for side in (0, 1))
    return re.compile(blocks, re.DOTALL), re.compile(opening), re.compile(closing)
