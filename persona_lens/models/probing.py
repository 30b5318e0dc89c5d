"""What a chat template does with system messages, reasoning and ends of turns, found by rendering probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Protocol

from persona_lens.core.errors import ModelError
from persona_lens.core.marks import CHANNEL, CLOSED_TAG, Marks, opened_marks


class Rendering(Protocol):
    """A `persona_lens.models.ChatFormat`, as far as it is asked here."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        ...

    @property
    def template(self) -> str:
        """The text of the template."""
        ...

    @property
    def think(self) -> bool:
        """Whether thinking is asked for."""
        ...

    def rendered_text(
        self,
        system: str | None,
        user: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """What the template writes."""
        ...


# Words that no template would write itself, so that finding them shows what became of a message.
SYSTEM = "probe of the instruction zebra kettle"
USER = "probe of the question walnut ladder"
ANSWER = "probe of the answer copper violin"
TURNS: list[Mapping[str, str]] = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]


def probed_system(chat: Rendering) -> tuple[bool, str | None]:
    """Find out what a template does with a system message, and without one, by rendering some.

    Returns:
        Whether it puts the system message's text into the prompt; and what to tell the user, where it does something
        surprising.

    Raises:
        ModelError: The template cannot even render one user message.
    """
    alone = chat.rendered_text(None, USER)
    if USER not in alone:
        raise ModelError("the chat template does not write the user's message as text; pass another template")
    where = "instructions are put at the head of the first user message instead"
    try:
        both = chat.rendered_text(SYSTEM, USER)
    except ModelError as error:
        reason = str(error.__cause__).strip().rstrip(".")
        return False, f"the chat template refuses system messages ({reason}): {where}"
    if SYSTEM not in both or USER not in both:
        return False, f"the chat template silently drops system messages: {where}"
    default = _default_system(alone, both)
    return True, default and f"without a system message the chat template writes one of its own: {default!r}"


def _default_system(alone: str, both: str) -> str | None:
    """Find what stands, without a system message, where the system message would have stood."""
    before, _, rest = both.partition(SYSTEM)
    after = rest.partition(USER)[0]
    head = alone.partition(USER)[0]
    if not (before and after and head.startswith(before) and head.endswith(after)):
        return None
    return head[len(before) : max(len(before), len(head) - len(after))].strip() or None


def probed_thinking(chat: Rendering) -> Literal["none", "off", "on", "always"]:
    """Find out whether the model reasons before it answers, and how far the template lets that be switched off."""
    on, off = (replace(chat, think=each) for each in (True, False))
    if probed_opened(off) is not None or CHANNEL in chat.template:
        return "on" if chat.think else "always"
    if on.rendered_text(None, USER) == off.rendered_text(None, USER):
        return "none"
    return "on" if chat.think else "off"


def probed_opened(chat: Rendering) -> Marks | None:
    """Find the marks of the reasoning that a template opens at the end of a prompt, if it opens any."""
    try:
        text = chat.rendered_text(None, messages=TURNS, add_generation_prompt=False)
        finished = text.partition(USER)[2].partition(ANSWER)[0]
    except ModelError:
        finished = ""
    return opened_marks(chat.rendered_text(None, USER).rpartition(USER)[2], finished)


def probed_end_of_turn(chat: Rendering) -> int | None:
    """Find the control token that a template writes right after an assistant's message, if it writes one."""
    # Some templates end a turn only where another follows, so the second conversation goes on.
    for conversation in (TURNS, [*TURNS, TURNS[0]]):
        try:
            text = chat.rendered_text(None, messages=conversation, add_generation_prompt=False)
        except ModelError:
            continue
        after = CLOSED_TAG.sub("", text.rpartition(ANSWER)[2]).lstrip()
        tokens = {
            str(token.content): index
            for index, token in chat.tokenizer.added_tokens_decoder.items()
            if str(token.content).strip() and after.startswith(str(token.content))
        }
        if tokens:
            return int(tokens[max(tokens, key=len)])
    return None
