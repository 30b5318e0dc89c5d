"""A tokenizer's chat template, what probing it shows, and a model's answer without its reasoning."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from persona_lens.core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Message = Mapping[str, str]
"""A chat message: ``{"role": "system" | "user" | "assistant", "content": text}``; ``"weight": "0"`` beside them
says of an answer that it is there to be read, not learned or screened."""

# Words that no template would write itself, so that finding them shows what became of a message.
_SYSTEM = "probe of the instruction zebra kettle"
_USER = "probe of the question walnut ladder"
_ANSWER = "probe of the answer copper violin"

# Some templates write today's date into every prompt. A run continued tomorrow, or repeated elsewhere, would
# see other prompts, so the date they are given is always this one (the one that Llama's template falls back
# on by itself).
_PINNED_DATE = datetime.date(2024, 7, 26)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TODAY = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>[^'\"]*)(?P=quote)\s*\)")


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template bound to its tokenizer."""

    tokenizer: PreTrainedTokenizerBase = field(repr=False, compare=False)
    """The tokenizer, for its special tokens and for turning text into ids."""
    source: str
    """The template's text."""
    thinking: bool = False
    """Whether the model is asked to reason before it answers, where the template leaves the choice."""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the text that the messages become.

        Raises:
            ModelError: The template refuses them.
        """
        return str(self._apply(messages, add_generation_prompt, tokenize=False))

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Return the token ids that the messages become, special tokens exactly as the template writes them.

        Raises:
            ModelError: The template refuses them.
        """
        ids = self._apply(messages, add_generation_prompt, tokenize=True)
        return [int(token) for token in ids]

    def encode_marked(self, messages: Sequence[Message]) -> tuple[tuple[int, ...], tuple[bool, ...]] | None:
        """Return the token ids of a whole conversation with the template's own mask of the assistant's tokens.

        None where the template has no ``{% generation %}``, or the tokenizer does not know its tokens' characters.

        Raises:
            ModelError: The template refuses them.
        """
        if _GENERATION.search(self.source) is None or not self.tokenizer.is_fast:
            return None
        found = self._apply(messages, False, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return tuple(map(int, found["input_ids"])), tuple(map(bool, found["assistant_masks"]))

    def _apply(self, messages: Sequence[Message], add_generation_prompt: bool, *, tokenize: bool, **how: Any) -> Any:
        options: dict[str, Any] = {"return_dict": False, **how}
        try:
            return self.tokenizer.apply_chat_template(
                [{"role": message["role"], "content": message["content"]} for message in messages],
                chat_template=self.pinned_source,
                add_generation_prompt=add_generation_prompt,
                tokenize=tokenize,
                **options,
                **self.variables,
            )
        except Exception as error:  # templates are programs: any error may come out of one
            raise ModelError(f"the chat template refuses these messages: {error}") from error

    @property
    def variables(self) -> dict[str, Any]:
        """What the template is given besides the messages; nothing that it does not mention."""
        given: dict[str, Any] = {}
        for switch in ("enable_thinking", "thinking"):
            if re.search(rf"(?<![\w.'\"]){switch}\b", self.source):
                given[switch] = self.thinking
        if self.writes_channels and "reasoning_effort" in self.source and not self.thinking:
            given["reasoning_effort"] = "low"  # as near to off as such a template goes
        return given

    @property
    def writes_channels(self) -> bool:
        """Whether the model reasons in a channel of its own before it answers in another, as gpt-oss does."""
        return "<|channel|>" in self.source

    @property
    def writes_date(self) -> bool:
        """Whether the template asks for today's date."""
        return _TODAY.search(self.source) is not None

    @property
    def pinned_source(self) -> str:
        """The template's text as rendered: with a fixed date where it asks for today's."""
        # In the text, because transformers lets no function be passed in to answer the template's call.
        return _TODAY.sub(lambda call: repr(_PINNED_DATE.strftime(call["format"])), self.source)


@dataclass(frozen=True)
class SystemProbe:
    """What a template does with a system message."""

    native: bool
    """It puts the system message's text into the prompt."""
    default: str | None
    """The system text it writes of itself when there is no system message."""
    note: str | None
    """For the user, where the template does something surprising."""


def probe_system(template: ChatTemplate) -> SystemProbe:
    """Find out what a template does with a system message, and without one, by rendering some.

    Raises:
        ModelError: The template cannot even render one user message.
    """
    alone = template.render([_message("user", _USER)])
    if _USER not in alone:
        raise ModelError("the chat template does not write the user's message as text; pass another template")
    where = "instructions are put at the head of the first user message instead"
    try:
        both = template.render([_message("system", _SYSTEM), _message("user", _USER)])
    except ModelError as error:
        reason = str(error.__cause__).strip().rstrip(".")
        return SystemProbe(False, None, f"the chat template refuses system messages ({reason}): {where}")
    if _SYSTEM not in both or _USER not in both:
        return SystemProbe(False, None, f"the chat template silently drops system messages: {where}")
    default = _default_system(alone, both)
    note = default and f"without a system message the chat template writes one of its own: {default!r}"
    return SystemProbe(True, default, note)


def _default_system(alone: str, both: str) -> str | None:
    """Find what stands, without a system message, where the system message would have stood."""
    before, _, rest = both.partition(_SYSTEM)
    after = rest.partition(_USER)[0]
    head = alone.partition(_USER)[0]
    if not (before and after and head.startswith(before) and head.endswith(after)):
        return None
    return head[len(before) : max(len(before), len(head) - len(after))].strip() or None


def probe_thinking(make: Callable[[bool], ChatTemplate]) -> tuple[bool, bool]:
    """Find out how far a template lets reasoning be switched off.

    Args:
        make: Makes the template with thinking on or off.

    Returns:
        Whether the two differ, and whether even the one without thinking makes the model think.
    """
    messages = [_message("user", _USER)]
    on, off = make(True).render(messages), make(False).render(messages)
    unavoidable = probe_opened(make(False)) is not None or make(False).writes_channels
    return on != off, unavoidable


def probe_opened(template: ChatTemplate) -> Marks | None:
    """Find the marks of the reasoning that a template opens at the end of a prompt, if it opens any."""
    question = _message("user", _USER)
    try:
        text = template.render([question, _message("assistant", _ANSWER)], add_generation_prompt=False)
        finished = text.partition(_USER)[2].partition(_ANSWER)[0]
    except ModelError:
        finished = ""
    return opened_marks(template.render([question]).rpartition(_USER)[2], finished)


def probe_end_of_turn(template: ChatTemplate) -> int | None:
    """Find the control token that a template writes right after an assistant's message, if it writes one."""
    turns = [_message("user", _USER), _message("assistant", _ANSWER)]
    # Some templates end a turn only where another follows, so the second conversation goes on.
    for conversation in (turns, [*turns, _message("user", _USER)]):
        try:
            text = template.render(conversation, add_generation_prompt=False)
        except ModelError:
            continue
        after = text.rpartition(_ANSWER)[2].lstrip()
        tokens = {
            str(token.content): index
            for index, token in template.tokenizer.added_tokens_decoder.items()
            if str(token.content).strip() and after.startswith(str(token.content))
        }
        if tokens:
            return int(tokens[max(tokens, key=len)])
    return None


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


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
_CHANNEL = "<|channel|>"
REASONING_TOKENS = frozenset(
    {*(mark for pair in _MARKS for mark in pair), _CHANNEL, "<|start|>", "<|message|>", "<|constrain|>", "<|end|>"}
)
"""Tokens within a response that set reasoning apart; in some models they are control tokens."""
_FINAL = re.compile(r"<\|channel\|>final[^<]*<\|message\|>(.*?)(?=<\|(?:end|return|start|channel)\|>|\Z)", re.DOTALL)


def answer_text(text: str, *, opened_by_prompt: bool = False, marks: tuple[Marks, ...] = ()) -> str:
    r"""Take the reasoning out of a response.

    Args:
        text: The response, special tokens included where the model marks its reasoning with them.
        opened_by_prompt: The prompt ended inside a reasoning block, so the response begins in it, whether or not the
            model repeats the mark that opened it.
        marks: What sets reasoning apart in this model, besides the marks that are known.

    Returns:
        The answer. Empty if the model never came to one: an unclosed block is reasoning to its end. A text
        without marks comes back unchanged.

    >>> answer_text("<think>Greet them.</think>\n\nHello!")
    'Hello!'
    >>> answer_text("<think>Greet")
    ''
    """
    if _CHANNEL in text:
        finals = _FINAL.findall(text)
        return str(finals[-1]).strip() if finals else ""
    blocks, opening, closing = _patterns(marks)
    left = text
    if opened_by_prompt:
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
    head, _, begun = prompt_end.rpartition(_CHANNEL)
    if begun and head and not begun.startswith("final"):
        return _CHANNEL + begun, _CHANNEL + "final"
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
def _patterns(marks: tuple[Marks, ...]) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """Whole blocks of reasoning, what opens one, and what closes one."""
    pairs = (*_MARKS, *marks)
    blocks = "|".join(f"{re.escape(begin)}.*?{re.escape(end)}" for begin, end in pairs)
    opening, closing = ("|".join(re.escape(pair[side]) for pair in pairs) for side in (0, 1))
    return re.compile(blocks, re.DOTALL), re.compile(opening), re.compile(closing)
