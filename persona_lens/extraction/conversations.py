"""`Conversations`: conversations of several turns, all of them held together, turn by turn, in a run folder.

A turn is an `persona_lens.extraction.experiment.Experiment` of its own: each conversation's next message is a request,
whose examples are the turns before it. So what an interrupted run has finished is never asked again, and whatever an
experiment takes (edits by row, reads, judges) a conversation takes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from persona_lens.backend import Backend, Read
from persona_lens.backend.batches import check_fits, context_length
from persona_lens.backend.reads import joined_reads
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.core.text import counted
from persona_lens.data.scripted import Scripted, distinct
from persona_lens.extraction.experiment import Answers, Experiment, Variant
from persona_lens.judging import Judge
from persona_lens.models import ChatFormat, Message
from persona_lens.models.chat import messages_of
from persona_lens.runs import RunFolder
from persona_lens.runs.chunks import Pieces
from persona_lens.runs.cost import Work, supposed_text, together
from persona_lens.runs.rollouts import EditsFor, Request, Rollout, RolloutBatches, row_seed
from persona_lens.runs.settings import RolloutSettings

MESSAGES = "messages.jsonl"


class ConversationError(PersonaLensError):
    """Conversations that cannot be held as asked."""


@dataclass(frozen=True)
class Conversation:
    """One person's conversation with the model, as far as it has come.

    Attributes:
        number: The person's, from 0; the same in every variant.
        user: The person.
        variant: How the model is asked: what tells this conversation from the same person's others.
        exchanges: Messages and the replies to them.
    """

    number: int
    user: Scripted
    variant: Variant
    exchanges: tuple[tuple[str, str], ...] = ()

    @property
    def messages(self) -> list[Message]:
        """Everything said, with the system prompt where there is one."""
        *said, _ = messages_of(self.variant.system, "", (*self.variant.examples, *self.exchanges))
        return said

    def request(self, message: str, seed: int) -> Request:
        """What the model is asked next.

        The labels are those of the variant, and ``question_number`` (the person's number: the unit that intervals are
        over), ``sample`` (0), ``user``, ``domain`` and ``turn``, which counts from 1.
        """
        turn = len(self.exchanges) + 1
        labels = {"question_number": self.number, "sample": 0, "user": self.user.name, "domain": self.user.domain}
        examples = (*self.variant.examples, *self.exchanges)
        return Request(
            self.variant.system,
            message,
            row_seed(seed, "conversation", self.user.name, turn),  # variants share it
            {**self.variant.labels, **labels, "turn": turn},
            examples,
        )

    def until(self, turn: int) -> Conversation:
        """The conversation as it was after so many turns."""
        return replace(self, exchanges=self.exchanges[:turn])

    def gone_on(self, message: str, reply: str) -> Conversation:
        """The conversation one exchange later."""
        return replace(self, exchanges=(*self.exchanges, (message, reply)))


Asks = Callable[[Sequence[Conversation]], Sequence[str]]
"""Gives the next message of each conversation, all of which have come equally far."""


def from_script(conversations: Sequence[Conversation]) -> list[str]:
    """The next message that each person's script has."""
    return [each.user.turns[len(each.exchanges)] for each in conversations]


@dataclass(frozen=True)
class Turn:
    """One turn of every conversation.

    Attributes:
        number: Counted from 1.
        conversations: As they are after it.
        answers: The replies, in the order of the conversations, with what judges said of them.
    """

    number: int
    conversations: tuple[Conversation, ...]
    answers: Answers

    @property
    def rollouts(self) -> list[Rollout]:
        """The replies."""
        return self.answers.rollouts

    def reads(self) -> dict[str, Tensor]:
        """What was read, by the names of `persona_lens.backend.Read`; the first axis follows the conversations."""
        return reads_in_order(self.answers.collected)


@dataclass(frozen=True)
class Conversations:
    """Conversations that are to be held.

    Attributes:
        backend: The model.
        chat: Its chat format.
        users: Who talks with it.
        variants: In which ways each of them does; all turns of one share their seeds with the same of the others.
        turns: How many turns each conversation has.
        seed: Base of every row's seed.
        settings: How replies are made.
        edits_for: Edits of a batch, given its requests (`Conversation.request` says what they hold).
        reads: What is read while the model replies.
        judges: Who scores the replies; each sees a message and its reply.
        asks: Says what the people say next; by default what their scripts have. What it says is kept in the folder,
            and not asked for again.
        prefix: What the names of files begin with; behind it stands ``turn-01-`` and so on.

    Raises:
        ConversationError: If nobody talks, or about nothing.
        DataError: If two people have the same name.
    """

    backend: Backend
    chat: ChatFormat
    users: Sequence[Scripted]
    variants: Sequence[Variant] = (Variant({}),)
    turns: int = 10
    seed: int = 0
    settings: RolloutSettings = field(default_factory=RolloutSettings)
    edits_for: EditsFor | None = None
    reads: Sequence[Read] = ()
    judges: Mapping[str, Judge] = field(default_factory=dict)
    asks: Asks | None = None
    prefix: str = ""

    def __post_init__(self) -> None:
        if not self.users or not self.variants or self.turns < 1:
            raise ConversationError("a conversation needs somebody who talks, and at least 1 turn")
        distinct(self.users, "the users")
        short = next((user for user in self.users if len(user.turns) < self.turns), None)
        if self.asks is None and short is not None:
            raise ConversationError(
                f"user {short.name} has {counted(len(short.turns), 'message')}, and {counted(self.turns, 'turn')} are "
                "asked for; ask for fewer turns, or take users with more messages"
            )

    def begun(self) -> tuple[Conversation, ...]:
        """The conversations before anything is said: variant by variant for the first person, then for the next."""
        return tuple(
            Conversation(number, user, variant) for number, user in enumerate(self.users) for variant in self.variants
        )

    def hold(self, folder: RunFolder | None = None, progress: Progress = shown_progress) -> Iterator[Turn]:
        """Hold the conversations, and give each turn once all of them have had it.

        Args:
            folder: Where turns are kept, and gone on with; None keeps them in memory.
            progress: Told how far a turn is.

        Raises:
            ContextError: If a conversation has become too long for the model.
        """
        conversations = self.begun()
        for number in range(1, self.turns + 1):
            messages = self._asked(conversations, number, folder, progress)
            answers = self._experiment(conversations, messages).run(folder, progress)
            replies = [rollout.response for rollout in answers.rollouts]
            after = zip(conversations, messages, replies, strict=True)
            conversations = tuple(each.gone_on(message, reply) for each, message, reply in after)
            yield Turn(number, conversations, answers)

    def check(self, behind: int = 0) -> None:
        """Refuse conversations that might become too long for the model, before anything is asked.

        Args:
            behind: Tokens of what is to stand behind a whole conversation.

        Raises:
            ContextError: If they would be, were every reply as long as it may be.
        """
        prompts = []
        for each in self.begun():
            *earlier, last = self._said(each, "")
            examples = [*each.variant.examples, *((message, "") for message in earlier)]
            prompts.append(self.chat.encode(each.variant.system, last, examples))
        written = 1 if self.asks is None else 2  # who has no script writes as much as the model
        new = written * self.turns * self.settings.max_new_tokens + behind
        check_fits(context_length(self.backend), map(len, prompts), new)

    def work(self) -> tuple[Work, ...]:
        """What holding them would ask of the model, and of the judges, all turns together; nothing runs."""
        found: list[Work] = []
        conversations = self.longest()
        for turn in range(self.turns):
            messages = [each.exchanges[turn][0] for each in conversations]
            found += self._experiment([each.until(turn) for each in conversations], messages).work()
        return together(found)

    def longest(self) -> tuple[Conversation, ...]:
        """The conversations, if every reply were as long as it may be, and people without a script wrote as much."""
        found = []
        for number, each in enumerate(self.begun()):
            words = supposed_text(number, self.settings.max_new_tokens)
            found.append(replace(each, exchanges=tuple((said, words) for said in self._said(each, words))))
        return tuple(found)

    def _said(self, conversation: Conversation, otherwise: str) -> tuple[str, ...]:
        """What a person says, turn by turn; who has no script says something else."""
        return conversation.user.turns[: self.turns] if self.asks is None else (otherwise,) * self.turns

    def _experiment(self, conversations: Sequence[Conversation], messages: Sequence[str]) -> Experiment:
        """One turn of every conversation."""
        number = len(conversations[0].exchanges) + 1
        requests = [each.request(message, self.seed) for each, message in zip(conversations, messages, strict=True)]
        return Experiment(
            self.backend,
            self.chat,
            requests,
            self.settings,
            self.judges,
            self.edits_for,
            self.reads,
            prefix=f"{self.prefix}turn-{number:02d}-",
        )

    def _asked(
        self, conversations: Sequence[Conversation], number: int, folder: RunFolder | None, progress: Progress
    ) -> list[str]:
        if self.asks is None:
            return from_script(conversations)
        asks, prefix = self.asks, f"{self.prefix}turn-{number:02d}-"

        def ask(_: int) -> list[Mapping[str, Any]]:
            said = list(asks(conversations))
            if len(said) != len(conversations):
                raise ConversationError(f"{len(said)} messages were given for {len(conversations)} conversations")
            return [{"message": message} for message in said]

        purposes = [json.dumps([each.user.name, dict(each.variant.labels), each.exchanges]) for each in conversations]
        pieces = Pieces(folder, prefix + MESSAGES, [range(len(purposes))], purposes, form=_message)
        total = len(purposes)
        return [
            _message(row) for row in pieces.run(ask, report=lambda done: progress(done, total, prefix + "messages"))
        ]


def _message(row: Mapping[str, Any]) -> str:
    if not isinstance(message := row["message"], str):
        raise TypeError("a message is a text")
    return message


def reads_in_order(collected: RolloutBatches) -> dict[str, Tensor]:
    """What was read while a set of responses was made, by name; the first axis follows the requests.

    Shapes as `persona_lens.backend.Read` has them, those of tokens padded on the left to the longest of all.
    """
    found = list(collected.reductions())
    if not found or not found[0][1]:
        return {}
    place = torch.argsort(torch.tensor([index for batch, _ in found for index in batch]))
    return {name: tensor[place] for name, tensor in joined_reads([tensors for _, tensors in found]).items()}
