"""Turning chats into token ids, and ids back into answers, as one model's chat template has it."""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

from persona_lens.core.errors import ModelError
from persona_lens.core.marks import CHANNEL, MARKS, SWITCHES, Marks
from persona_lens.core.progress import note
from persona_lens.models.probing import USER, probed_end_of_turn, probed_opened, probed_system, probed_thinking
from persona_lens.models.reasoning import answer_of, answer_text, in_channels, special_marks, stretches, unmarked

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from persona_lens.backend import Backend
    from persona_lens.backend.parts import Part, Parts
    from persona_lens.backend.parts.table import Vocabulary

Message = Mapping[str, str]
"""A chat message: ``{"role": "system" | "user" | "assistant", "content": text}``; ``"weight": "0"`` beside them
says of an answer that it is there to be read, not learned or screened."""

# Some templates write today's date into every prompt. A run continued tomorrow, or repeated elsewhere, would
# see other prompts, so the date they are given is always this one (the one that Llama's template falls back
# on by itself).
_PINNED_DATE = datetime.date(2024, 7, 26)
USUAL_MARKS = f"{{# {' '.join(MARKS[0])} #}}"  # to be found because a template names them
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TODAY = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>[^'\"]*)(?P=quote)\s*\)")


@dataclass(frozen=True)
class ChatFormat:
    """How one model wants its chats written, found out by rendering probes, never from the model's name."""

    tokenizer: PreTrainedTokenizerBase = field(repr=False, compare=False)
    """The tokenizer, for its special tokens and for turning text into ids."""
    template: str
    """The text of the Jinja chat template."""
    think: bool = False
    """Whether the model is asked to reason before it answers, where the template leaves the choice."""
    system_role: Literal["native", "in_first_user_turn"] = "native"
    """Where instructions go: into a system message, or to the head of the first user message, for templates
    that refuse or drop system messages."""
    thinking: Literal["none", "off", "on", "always"] = "none"
    """``none``: the template knows no reasoning. ``off``, ``on``: as asked. ``always``: cannot be switched
    off."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What the user should be told about this format, one sentence each."""

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, *, thinking: bool = False) -> ChatFormat:
        """Find out how to write chats for a tokenizer's model.

        Args:
            tokenizer: The tokenizer, with the chat template that is to be used: what is thinking and what is answer is
                told by it too. A backend is opened with another template (``chat_template``); who loads a tokenizer may
                set its ``chat_template``.
            thinking: Let the model reason before it answers, where there is a choice.

        Raises:
            ModelError: There is no chat template, or it cannot render one user message.
        """
        chosen = cls(tokenizer, _template_of(tokenizer), thinking)
        native, system_note = probed_system(chosen)
        state = probed_thinking(chosen)
        always = (
            "this model reasons before every answer and its chat template cannot switch that off: allow for more "
            "tokens; only what follows the reasoning counts as the answer"
        )
        switch = "the chat template has no switch for thinking: to ask for it (--thinking) changes nothing"
        date = "the chat template writes today's date; it is given 26 July 2024 every day, so that runs can be repeated"
        known = {"always": always, "none": switch if thinking else None}.get(state)
        notes = (system_note, known, date if _TODAY.search(chosen.template) else None)
        return replace(
            chosen,
            system_role="native" if native else "in_first_user_turn",
            thinking=state,
            notes=tuple(note for note in notes if note),
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what shapes the prompts: the template's text and whether thinking was asked for."""
        return hashlib.sha256(f"{self.think}\n{self.template}".encode()).hexdigest()

    @property
    def reasons(self) -> bool:
        """Whether a response may hold reasoning, which is no part of the `answer`."""
        return self.thinking in ("on", "always") or self.opened_reasoning is not None

    @property
    def may_reason(self) -> bool:
        """Whether a response may hold reasoning as far as is known; a model may have its marks and never use them."""
        return self.reasons or (self.thinking == "none" and self.parts.thinks)

    def encode(self, system: str | None, user: str, examples: Sequence[tuple[str, str]] = ()) -> list[int]:
        """Return the prompt for one question, up to where the model begins to answer.

        Args:
            system: The instruction, or None for no system message.
            user: The question.
            examples: Questions and their answers, as turns before the question.

        Raises:
            ModelError: The template refuses the messages.
        """
        return self.encode_messages(messages_of(system, user, examples))

    def encode_messages(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Return the token ids of a conversation.

        The ids are those of the rendered template, with nothing added: no second begin-of-text token.

        Args:
            messages: The conversation; a system message may only come first.
            add_generation_prompt: End with the head of an assistant message, for the model to go on from.

        Raises:
            ModelError: The messages are malformed, or the template refuses them.
        """
        return [int(token) for token in self._apply(messages, add_generation_prompt, tokenize=True)]

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
        chosen = messages if messages is not None else messages_of(system, user or "")
        return str(self._apply(chosen, add_generation_prompt, tokenize=False))

    def encode_answer(self, text: str) -> list[int]:
        """Return the token ids of an answer from elsewhere, to be put after a prompt's ids.

        What looks like a control token in the text is encoded as ordinary text, so that it cannot end the
        turn; but marks of reasoning are the tokens that they are to the model.
        """
        marks = "|".join(re.escape(mark) for mark in sorted(special_marks(self.tokenizer), key=len, reverse=True))
        ids: list[int] = []
        for number, piece in enumerate(re.split(f"({marks})", text) if marks else [text]):
            if number % 2:
                ids.append(self.tokenizer.get_added_vocab()[piece])
            elif piece:
                encoded: Any = self.tokenizer(piece, add_special_tokens=False, split_special_tokens=True)
                ids += map(int, encoded["input_ids"])
        return ids

    def encode_marked(self, messages: Sequence[Message]) -> tuple[tuple[int, ...], tuple[bool, ...]] | None:
        """Return the token ids of a whole conversation, and which of them the template marks as the assistant's.

        None where the template marks nothing (it has no ``{% generation %}``) or the tokenizer cannot tell.

        Raises:
            ModelError: The messages are malformed, or the template refuses them.
        """
        if _GENERATION.search(self.template) is None or not self.tokenizer.is_fast:
            return None
        found = self._apply(messages, False, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        marked = tuple(map(bool, found["assistant_masks"]))
        return (tuple(map(int, found["input_ids"])), marked) if any(marked) else None

    def closing_ids(self) -> tuple[int, ...]:
        """Return what ends an assistant's turn: the template's control token, or else the tokenizer's end."""
        probed = probed_end_of_turn(self)
        end: Any = probed if probed is not None else self.tokenizer.eos_token_id
        return () if end is None else (int(end),)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids without control tokens, spaces exactly as the model wrote them."""
        return self._text(ids, skip_special_tokens=True)

    def answer(self, ids: Sequence[int]) -> str:
        """Return the answer in a response's token ids: no reasoning, no control tokens.

        Empty where the model was still reasoning when its tokens ran out.
        """
        if self.parts.thinks:
            return answer_of(self.parts, self.begins, ids, partial(self._text, skip_special_tokens=False))
        raw = self._text(ids, skip_special_tokens=False)
        answer = answer_text(raw, self.opened_reasoning)
        if answer == raw:
            return self.decode(ids)
        for token in self.tokenizer.all_special_tokens:
            answer = answer.replace(token, "")
        return answer.strip()

    def end_of_turn_ids(self, generation_config: GenerationConfig | None = None) -> tuple[int, ...]:
        """Return the tokens that end a response; see `end_of_turn_ids`."""
        return end_of_turn_ids(self.tokenizer, generation_config, self)

    @cached_property
    def opened_reasoning(self) -> Marks | None:
        """What opens and what closes the reasoning that a prompt ends in; None where a response begins outside any."""
        return probed_opened(self)

    @cached_property
    def parts(self) -> Parts:
        """Which tokens of a response are thinking and which are answer."""
        from persona_lens.backend.parts import Parts

        return Parts.of(self.tokenizer, self.template)

    @cached_property
    def text_parts(self) -> Parts:
        """`parts`, for texts that others wrote: the usual marks count beside those of the model."""
        from persona_lens.backend.parts import Parts

        if MARKS[0] in self.parts.marks:
            return self.parts
        return Parts.of(self.tokenizer, self.template + USUAL_MARKS)

    def stretches(self, prompt: Sequence[int], ids: Sequence[int], *, of_others: bool = False) -> tuple[str, ...]:
        """Which tokens of a finished response are ``thinking`` and which ``answer``; empty where none is thinking.

        Args:
            prompt: Token ids before it.
            ids: The response.
            of_others: It may be anybody's text; see `parts_of_text`.
        """
        if of_others:
            return stretches(self.parts_of_text(prompt, ids))
        return stretches(self._whole(self.parts, prompt, ids)) if self.parts.thinks else ()

    def parts_of_text(self, prompt: Sequence[int], ids: Sequence[int]) -> tuple[Part, ...]:
        """What each token of a response from anywhere is; of a mark in several tokens none is thinking or answer.

        Besides the model's own marks the usual ones count, and messages as gpt-oss writes them. What a prompt opens
        counts only where the text closes it without opening it: most data sets hold answers alone, which may quote
        both. It does not matter whether the conversation was written so: templates leave it out of turns that are over.

        Args:
            prompt: Token ids before it.
            ids: The response.
        """
        text, parts = self._text(ids, skip_special_tokens=False), self.text_parts
        spelled = CHANNEL in text and self.tokenizer.get_added_vocab().get(CHANNEL) not in ids
        if spelled and (found := in_channels(self._vocabulary.bytes_of(ids))):
            return found
        if self.opened_reasoning is not None:
            opening, closing = self.opened_reasoning
            thought, mark, _ = text.partition(closing)
            return self._whole(parts, self._prompt if mark and opening not in thought else (), ids)
        closed = any(closing in text for _, closing in parts.marks)
        return self._whole(parts, prompt if closed else (), ids)

    def _whole(self, parts: Parts, prompt: Sequence[int], ids: Sequence[int]) -> tuple[Part, ...]:
        """What tokens of a response are that is there as a whole, so that marks are known from their first token."""
        told = parts.of_response(prompt, ids)
        return unmarked(told, ids, parts.marks, partial(self._text, skip_special_tokens=False))

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        from persona_lens.backend.parts.table import Vocabulary

        return Vocabulary(self.tokenizer, self.template)

    @cached_property
    def begins(self) -> int:
        """Where `parts` stand at the end of a prompt."""
        return self.parts.after(self._prompt)

    @cached_property
    def _prompt(self) -> list[int]:
        """A prompt, which ends as all do."""
        return self.encode(None, USER)

    def _text(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def _apply(self, messages: Sequence[Message], add_generation_prompt: bool, *, tokenize: bool, **how: Any) -> Any:
        placed = [{"role": message["role"], "content": message["content"]} for message in self._placed(messages)]
        # What the template is given besides the messages; nothing that it does not mention.
        switches = (each for each in SWITCHES if re.search(rf"(?<![\w.'\"]){each}\b", self.template))
        options: dict[str, Any] = {"return_dict": False, **how, **dict.fromkeys(switches, self.think)}
        if CHANNEL in self.template and "reasoning_effort" in self.template and not self.think:
            options["reasoning_effort"] = "low"  # as near to off as such a template goes
        try:
            # In the text, because transformers lets no function be passed in to answer the template's call.
            dated = _TODAY.sub(lambda call: repr(_PINNED_DATE.strftime(call["format"])), self.template)
            return self.tokenizer.apply_chat_template(
                placed,
                chat_template=dated,
                add_generation_prompt=add_generation_prompt,
                tokenize=tokenize,
                **options,
            )
        except Exception as error:  # templates are programs: any error may come out of one
            raise ModelError(f"the chat template refuses these messages: {error}") from error

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
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None = None,
    chat: ChatFormat | None = None,
) -> tuple[int, ...]:
    """Collect the tokens that end a model's turn.

    They are the end tokens of the generation configuration and of the tokenizer, and the control token that
    the chat template writes after an assistant's message, which base models turned into chat models often
    lack in both.

    Args:
        tokenizer: The tokenizer.
        generation_config: The model's ``generation_config``.
        chat: A chat format instead of the tokenizer's.

    Returns:
        The ids, ascending. Empty for a model that knows no end.
    """
    configured: Any = getattr(generation_config, "eos_token_id", None)
    found = list(configured) if isinstance(configured, (list, tuple)) else [configured]
    found.append(tokenizer.eos_token_id)
    with suppress(ModelError):  # base models have no template
        found.append(probed_end_of_turn(chat or ChatFormat(tokenizer, _template_of(tokenizer))))
    return tuple(sorted({int(token) for token in found if token is not None}))


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except (ValueError, AttributeError) as error:
        raise ModelError(
            "this model has no chat template, so it is probably a base model: use an instruct model, or give "
            "a template with --chat-template FILE"
        ) from error


def messages_of(system: str | None, user: str, examples: Sequence[tuple[str, str]] = ()) -> list[Message]:
    """The messages of a conversation up to a question; arguments as for `ChatFormat.encode`."""
    found: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for asked, answered in examples:
        found += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*found, {"role": "user", "content": user}]


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
    """Say, where a model reasons before it answers, what is of its answer and what is of both."""
    if chat.reasons:
        note(
            "this model reasons before it answers: judges see the answer alone, and vectors are made of it, an axis "
            "too, and the projections of `steer effects`, `steer persist`, `monitor drift` and `monitor baseline`; "
            "what else is read or steered over a response takes in the reasoning, but `on answer` and `on thinking`"
        )
