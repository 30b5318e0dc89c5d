"""The marks that set a model's reasoning apart from its answer, in the families of models that there are."""

from __future__ import annotations

import re
from collections.abc import Iterator

Marks = tuple[str, str]
"""What opens reasoning, and what closes it."""

# By family: DeepSeek, Qwen and most others; Seed; Magistral; Gemma 4; Kimi VL; Kimi K3; Granite
# and others; Cohere.
MARKS: tuple[Marks, ...] = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought", "<channel|>"),
    ("◁think▷", "◁/think▷"),
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    ("<reasoning>", "</reasoning>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
# Apriel's are words that anybody may write: marks where a chat template names them, and nowhere else.
WORDS: tuple[Marks, ...] = (("Here are my reasoning steps:\n", "[BEGIN FINAL RESPONSE]"),)
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
FINAL = "final"
HARMONY = ("<|start|>", CHANNEL, "<|message|>", "<|constrain|>", "<|end|>")
"""The tokens of its messages: a head of a role and a channel, what is said, and the end."""
TAGS = ("<|open|>", "<|sep|>", "<|close|>")
"""The tokens of Kimi K3's tags: ``<|open|>think<|sep|>``, and so on."""
CLOSED_TAG = re.compile(r"<\|close\|>\w+<\|sep\|>")
"""Such a tag's end: that of thinking too, so it ends no turn, although it is the first that a template writes then."""
# Muse Glimmer has the same heads without channels: a message is to somebody, and only one to the user is the answer.
RECIPIENTS: Marks = ("to=self", "to=user")
# The same written as text, as data sets have it: a head, what is said, and its end, if that is there.
_MESSAGE = re.compile(
    rb"\s*(?:<\|start\|>assistant[^<]*)?<\|channel\|>(?P<channel>[^<]*)(?:<\|constrain\|>[^<]*)?<\|message\|>"
    rb"(?P<said>.*?)(?:<\|(?:end|return|call)\|>|(?=<\|(?:start|channel)\|>)|\Z)",
    re.DOTALL,
)
_HEAD = re.compile(rb"\s*(?:<\|(?:start|channel)\|>|\Z)")
THOUGHTS = {CHANNEL: "<|channel|>analysis<|message|>", RECIPIENTS[0]: " to=self<|message|>"}
"""How a message that is thinking begins, behind the role: in gpt-oss and in Muse."""
ANSWERS = {
    CHANNEL: "<|end|><|start|>assistant<|channel|>final<|message|>",
    RECIPIENTS[0]: "<|eom|><|start|>assistant to=user<|message|>",
    TAGS[0]: "<|close|>think<|sep|><|open|>response<|sep|>",
}
"""How a message that is thinking is followed by the answer: in gpt-oss, in Muse and in Kimi K3."""
SWITCHES = ("enable_thinking", "thinking", "reasoning")
"""What chat templates are told by whether to think."""
REASONING_TOKENS = frozenset({*(mark for pair in MARKS for mark in pair), *HARMONY})
"""Tokens within a response that set reasoning apart; in some models they are control tokens."""


def may_hold_marks(text: str) -> bool:
    """Whether anything in a text may set reasoning apart."""
    return CHANNEL in text or any(mark in text for pair in MARKS for mark in pair)


def channel_messages(text: bytes) -> Iterator[tuple[int, int, bool]]:
    """What is said in a text that begins with a message as gpt-oss writes them; all around it is markup.

    Args:
        text: UTF-8, or the beginning of it.

    Yields:
        The first byte of what is said, the one behind its last, and whether it is the answer. Nothing where the text
        begins otherwise: such markup in the middle of other text is quoted.
    """
    place, begun = 0, False
    while (found := _MESSAGE.match(text, place)) is not None:
        channel = found["channel"].split()
        yield (*found.span("said"), channel[:1] == [FINAL.encode()])
        place, begun = found.end(), True
    if begun and _HEAD.match(text, place) is None:
        yield place, len(text), True


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
    if begun and head and not begun.startswith(FINAL):
        return CHANNEL + begun, CHANNEL + FINAL
    return next((marks for marks in _open_in(prompt_end) if marks not in _open_in(finished)), None)


def _open_in(text: str) -> list[Marks]:
    """Marks that are open at the end of a text, the last first."""
    found = [(match.end(), marks) for marks in (*MARKS, *WORDS) for match in re.finditer(re.escape(marks[0]), text)]
    for tag, closing in _TAGS:
        for match in tag.finditer(text):
            opened = match[0]
            found.append((match.end(), (opened, closing.format(match["name"]) if closing else _ending(opened))))
    left = (each for each in sorted(found, key=lambda each: -each[0]) if each[1][1] not in text[each[0] :])
    return [marks for _, marks in left]


def _ending(opened: str) -> str:
    pairs = (("START_", "END_"), ("start_", "end_"), ("begin_", "end_"), ("_start", "_end"), ("_begin", "_end"))
    return next(opened.replace(begin, end) for begin, end in pairs if begin in opened)
