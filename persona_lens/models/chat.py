"""Turning chats into token ids, and ids back into answers, as one model's chat template has it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from persona_lens.core.errors import ModelError
from persona_lens.core.progress import note
from persona_lens.models.templates import (
    ChatTemplate,
    Marks,
    Message,
    answer_text,
    probe_end_of_turn,
    probe_opened,
    probe_system,
    probe_thinking,
)

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from persona_lens.backend import Backend


@dataclass(frozen=True)
class ChatFormat:
    """How one model wants its chats written, found out by rendering probes, never from the model's name."""

    template: ChatTemplate
    """The template, bound to the tokenizer."""
    system_role: Literal["native", "in_first_user_turn"]
    """Where instructions go: into a system message, or to the head of the first user message, for templates
    that refuse or drop system messages."""
    default_system: str | None
    """The system text that the template writes of itself when there is no system message."""
    thinking: Literal["none", "off", "on", "always"]
    """``none``: the template knows no reasoning. ``off``, ``on``: as asked. ``always``: cannot be switched
    off."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What the user should be told about this format, one sentence each."""

    @classmethod
    def from_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, *, template: str | None = None, thinking: bool = False
    ) -> ChatFormat:
        """Find out how to write chats for a tokenizer's model.

        Args:
            tokenizer: The tokenizer.
            template: The text of a Jinja chat template to use instead of the tokenizer's.
            thinking: Let the model reason before it answers, where there is a choice.

        Raises:
            ModelError: There is no chat template, or it cannot render one user message.
        """
        source = template if template is not None else _template_of(tokenizer)

        def make(with_thinking: bool) -> ChatTemplate:
            return ChatTemplate(tokenizer, source, with_thinking)

        chosen = make(thinking)
        system = probe_system(chosen)
        switchable, unavoidable = probe_thinking(make)
        state: Literal["none", "off", "on", "always"] = "none"
        if unavoidable:
            state = "on" if thinking else "always"
        elif switchable:
            state = "on" if thinking else "off"
        notes = [
            system.note,
            "this model reasons before every answer and its chat template cannot switch that off: allow for "
            "more tokens; only what follows the reasoning counts as the answer"
            if state == "always"
            else None,
            "the chat template writes today's date; it is given 26 July 2024 every day, so that runs can be repeated"
            if chosen.writes_date
            else None,
        ]
        return cls(
            template=chosen,
            system_role="native" if system.native else "in_first_user_turn",
            default_system=system.default,
            thinking=state,
            notes=tuple(note for note in notes if note),
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self.template.tokenizer

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what shapes the prompts: the template's text and whether thinking was asked for."""
        return hashlib.sha256(f"{self.template.thinking}\n{self.template.source}".encode()).hexdigest()

    @property
    def reasons(self) -> bool:
        """Whether a response may hold reasoning, which is no part of the `answer`."""
        return self.thinking in ("on", "always") or self.opened_reasoning is not None

    def encode(self, system: str | None, user: str, examples: Sequence[tuple[str, str]] = ()) -> list[int]:
        """Return the prompt for one question, up to where the model begins to answer.

        Args:
            system: The instruction, or None for no system message.
            user: The question.
            examples: Questions and their answers, as turns before the question.

        Raises:
            ModelError: The template refuses the messages.
        """
        *head, question = _pair(system, user)
        turns: list[Message] = []
        for asked, answered in examples:
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return self.encode_messages([*head, *turns, question])

    def encode_messages(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Return the token ids of a conversation.

        The ids are those of the rendered template, with nothing added: no second begin-of-text token.

        Args:
            messages: The conversation; a system message may only come first.
            add_generation_prompt: End with the head of an assistant message, for the model to go on from.

        Raises:
            ModelError: The messages are malformed, or the template refuses them.
        """
        placed = self._placed(messages)
        return self.template.encode(placed, add_generation_prompt=add_generation_prompt)

    def rendered_text(
        self,
        system: str | None,
        user: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return a prompt as text: what is really sent, a system message of the template's own included.

        Args:
            system: The instruction, or None for no system message.
            user: The question.
            messages: A conversation, instead of the two.
            add_generation_prompt: End with the head of an assistant message, for the model to go on from.

        Raises:
            ModelError: The messages are malformed, or the template refuses them.
        """
        chosen = messages if messages is not None else _pair(system, user or "")
        return self.template.render(self._placed(chosen), add_generation_prompt=add_generation_prompt)

    def encode_answer(self, text: str) -> list[int]:
        """Return the token ids of an answer from elsewhere, to be put after a prompt's ids.

        What looks like a control token in the text is encoded as ordinary text, so that it cannot end the
        turn.
        """
        encoded: Any = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return [int(token) for token in encoded["input_ids"]]

    def encode_marked(self, messages: Sequence[Message]) -> tuple[tuple[int, ...], tuple[bool, ...]] | None:
        """Return the token ids of a whole conversation, and which of them the template marks as the assistant's.

        None where the template marks nothing (it has no ``{% generation %}``) or the tokenizer cannot tell.

        Raises:
            ModelError: The messages are malformed, or the template refuses them.
        """
        found = self.template.encode_marked(self._placed(messages))
        return found if found is not None and any(found[1]) else None

    def closing_ids(self) -> tuple[int, ...]:
        """Return what ends an assistant's turn: the template's control token, or else the tokenizer's end."""
        probed = probe_end_of_turn(self.template)
        end: Any = probed if probed is not None else self.tokenizer.eos_token_id
        return () if end is None else (int(end),)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids without control tokens, spaces exactly as the model wrote them."""
        return self._text(ids, skip_special_tokens=True)

    def answer(self, ids: Sequence[int]) -> str:
        """Return the answer in a response's token ids: no reasoning, no control tokens.

        Empty where the model was still reasoning when its tokens ran out.
        """
        raw = self._text(ids, skip_special_tokens=False)
        opened = self.opened_reasoning
        answer = answer_text(raw, opened_by_prompt=opened is not None, marks=(opened,) if opened else ())
        if answer == raw:
            return self.decode(ids)
        for token in self.tokenizer.all_special_tokens:
            answer = answer.replace(token, "")
        return answer.strip()

    def end_of_turn_ids(self, generation_config: GenerationConfig | None = None) -> tuple[int, ...]:
        """Return the tokens that end a response; see `end_of_turn_ids`."""
        return _end_of_turn_ids(self.tokenizer, generation_config, self.template)

    @cached_property
    def opened_reasoning(self) -> Marks | None:
        """What opens and what closes the reasoning that a prompt ends in; None where a response begins outside any."""
        return probe_opened(self.template)

    def _text(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def _placed(self, messages: Sequence[Message]) -> list[Message]:
        """Check the messages, and put the system message where this template takes it."""
        _check(messages)
        if self.system_role == "native" or messages[0]["role"] != "system":
            return list(messages)
        system, *rest = messages
        if not rest or rest[0]["role"] != "user":
            raise ModelError("this model takes its instructions in the first user message, and there is none")
        text = f"{system['content']}\n\n{rest[0]['content']}" if system["content"] else rest[0]["content"]
        return [{"role": "user", "content": text}, *rest[1:]]


def end_of_turn_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> tuple[int, ...]:
    """Collect the tokens that end a model's turn.

    They are the end tokens of the generation configuration and of the tokenizer, and the control token that
    the chat template writes after an assistant's message, which base models turned into chat models often
    lack in both.

    Args:
        tokenizer: The tokenizer.
        generation_config: The model's ``generation_config``.

    Returns:
        The ids, ascending. Empty for a model that knows no end.
    """
    try:
        template = ChatTemplate(tokenizer, _template_of(tokenizer))
    except ModelError:
        return _end_of_turn_ids(tokenizer, generation_config, None)
    return _end_of_turn_ids(tokenizer, generation_config, template)


def _end_of_turn_ids(
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
    template: ChatTemplate | None,
) -> tuple[int, ...]:
    configured: Any = getattr(generation_config, "eos_token_id", None)
    found = list(configured) if isinstance(configured, (list, tuple)) else [configured]
    found.append(tokenizer.eos_token_id)
    if template is not None:
        found.append(probe_end_of_turn(template))
    return tuple(sorted({int(token) for token in found if token is not None}))


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except (ValueError, AttributeError) as error:
        raise ModelError(
            "this model has no chat template, so it is probably a base model: use an instruct model, or give "
            "a template with --chat-template FILE"
        ) from error


def _pair(system: str | None, user: str) -> list[Message]:
    question: Message = {"role": "user", "content": user}
    return [question] if system is None else [{"role": "system", "content": system}, question]


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise ModelError("a conversation needs at least one message")
    for place, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise ModelError(f"message {place} needs a role and a content, both text: {dict(message)!r}")
        if role == "system" and place > 0:
            raise ModelError(f"message {place} is a system message; only the first message may be one")


def chat_format(backend: Backend) -> ChatFormat:
    """The chat format of a backend's model."""
    return ChatFormat.from_tokenizer(backend.tokenizer)


def note_reasoning(chat: ChatFormat) -> None:
    """Say, where a model reasons before it answers, that activations have the reasoning in them and judges do not."""
    if chat.reasons:
        note(
            "this model reasons before it answers: what is read and steered over a response takes in its reasoning, "
            "while a judge sees the answer alone"
        )
