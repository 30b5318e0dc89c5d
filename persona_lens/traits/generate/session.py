"""The session in which a model writes: part by part, checked; what is missing or weak is asked for again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

from pydantic import BaseModel, ValidationError

from persona_lens.core.progress import Progress
from persona_lens.core.text import in_short
from persona_lens.traits.checks import Advice
from persona_lens.traits.generate.authors import Author, AuthoringError, found_json, in_words, items, reply_schema
from persona_lens.traits.generate.unfinished import DraftT, again
from persona_lens.traits.kind import Content, Kind
from persona_lens.traits.parsing import explain
from persona_lens.traits.problems import Severity, field_name


@dataclass(frozen=True)
class Limits:
    """How often a model is asked before one gives up.

    Attributes:
        batch: Questions asked for at once.
        attempts: Requests for what is of use as a whole only: the adjectives, the rubric, a role's grades.
        instructions: Requests for the instruction pairs, or for a role's system prompts.
        questions: Requests for the questions.
        repairs: Rounds in which what the checks find fault with is asked for anew.
        repair_requests: Requests in such a round, for each part that is a list.
    """

    batch: int = 10
    attempts: int = 3
    instructions: int = 5
    questions: int = 12
    repairs: int = 2
    repair_requests: int = 3


@dataclass(frozen=True)
class PlannedStep:
    """How many requests a part of the work takes."""

    step: str
    at_least: int
    at_most: int


_SHOWN_COMPLAINTS = 6


@dataclass
class Session(Generic[DraftT]):
    """Where a draft is worked on.

    Attributes:
        author: Who writes.
        draft: What there is.
        limits: How often to ask.
        keep: Called after every reply. Not named ``save``: nnsight gives every object a method of that name, which a
            dataclass takes for the field's default.
        progress: Told of the parts that are there.
        complaints: What was wrong with the last reply; the author is told.
    """

    author: Author
    draft: DraftT
    limits: Limits
    keep: Callable[[DraftT], None]
    progress: Progress
    complaints: list[str] = field(default_factory=list)

    def ask(self, what: str, request: str, reply: type[BaseModel]) -> object:
        """Make one request.

        Args:
            what: The part it is for.
            request: Its text.
            reply: What is expected.

        Returns:
            The data in the reply; None where there is none, which becomes a complaint.

        Raises:
            AuthoringError: The author failed.
        """
        request += again(self.complaints[:_SHOWN_COMPLAINTS])
        self.draft.requests += 1
        try:
            text = self.author.write(self.draft.system, request, reply_schema(reply))
        except Exception as error:  # an author may be anybody's code; what is written already must outlast it
            reason = in_short(str(error), 400).rstrip(".") or type(error).__name__
            raise AuthoringError(
                f"the author model failed in request {self.draft.requests}, for the {what}: {reason}. "
                f"Still missing: {', '.join(self.draft.missing) or 'nothing'}"
            ) from error
        try:
            data = found_json(text)
        except ValueError as error:
            self.complaints = [f"it {error}"]
            return None
        self.complaints = []
        return data

    def took(self, what: str, done: int, total: int) -> None:
        """Keep what a reply has brought, and what it has shown of the author."""
        self.draft.origin = {**self.draft.origin, **self.author.describe()}
        self.keep(self.draft)
        self.progress(done, total, what)

    def require(self, what: str, count: int, needed: int) -> None:
        """Go no further with a part that is not complete.

        Raises:
            AuthoringError: It is not.
        """
        if count < needed:
            last = f" (the last reply: {in_short('; '.join(self.complaints), 300)})" if self.complaints else ""
            raise AuthoringError(
                f"the author model wrote {count} of {needed} {what} that can be used{last}, after "
                f"{self.draft.requests} requests. Still missing: {', '.join(self.draft.missing)}. A larger "
                "--author-model may do better"
            )
        self.complaints = []


@dataclass(frozen=True)
class Written(Generic[Content]):
    """What a model has written.

    Attributes:
        content: The trait, or the role.
        advice: What the checks still find fault with.
        requests: How many replies it took, those of an interrupted run included.
    """

    content: Content
    advice: tuple[Advice, ...]
    requests: int


@dataclass(frozen=True)
class Whole(Generic[DraftT]):
    """A part of the draft that is of use as a whole only.

    Attributes:
        key: Field of the draft.
        what: What it is called.
        request: Writes the request.
        reply: Type of the reply.
    """

    key: str
    what: str
    request: Callable[[DraftT], str]
    reply: type[BaseModel]

    def planned(self, limits: Limits) -> PlannedStep:
        """How many requests it takes."""
        return PlannedStep(self.what, 1, limits.attempts)

    def write(self, session: Session[DraftT]) -> None:
        """Ask for it, if it is not there."""

        def there() -> int:
            return int(getattr(session.draft, self.key) is not None)

        for _ in range(session.limits.attempts):
            if there():
                break
            data = session.ask(self.what, self.request(session.draft), self.reply)
            try:
                if data is not None:
                    setattr(session.draft, self.key, self.reply.model_validate(data))
            except ValidationError as error:
                session.complaints = [in_words(error)]
            session.took(self.what, there(), 1)
        session.require(self.what, there(), 1)


@dataclass(frozen=True)
class Part(Generic[DraftT]):
    """A part of the draft that is a list: how to ask for more of it, and what speaks against one more.

    Attributes:
        key: Field of the draft, and key of the reply.
        what: What its items are called.
        total: How many there must be.
        kind: Type of an item.
        reply: Type of the reply.
        request: Writes the request, given the draft, how many to ask for, and what must not come again.
        fault: What is wrong with an item beside those that are known; empty if nothing is.
        limit: The field of `Limits` that says how often it is asked for.
        batched: Whether so many are needed that not all are asked for at once.
    """

    key: str
    what: str
    total: int
    kind: Any
    reply: type[BaseModel]
    request: Callable[[DraftT, int, Sequence[Any]], str]
    fault: Callable[[Any, Sequence[Any]], str]
    limit: str
    batched: bool = False

    @property
    def step(self) -> str:
        """What it is called where requests are counted."""
        return self.key.replace("_", " ")

    def planned(self, limits: Limits) -> PlannedStep:
        """How many requests it takes."""
        return PlannedStep(self.step, math.ceil(self.total / limits.batch) if self.batched else 1, self.most(limits))

    def most(self, limits: Limits) -> int:
        """How many requests it takes at most."""
        return int(getattr(limits, self.limit))

    def write(self, session: Session[DraftT]) -> None:
        """Ask for the items that are not there."""
        self.gather(session, self.most(session.limits))
        session.require(self.what, len(getattr(session.draft, self.key)), self.total)

    def gather(self, session: Session[DraftT], requests: int, refused: Sequence[Any] = ()) -> None:
        """Ask for items until all are there, or there were so many requests; what is refused must not come again."""
        for _ in range(requests):
            there: list[Any] = getattr(session.draft, self.key)
            missing = self.total - len(there)
            if not missing:
                return
            count = min(missing, session.limits.batch) if self.batched else missing
            data = session.ask(self.step, self.request(session.draft, count, [*there, *refused]), self.reply)
            if data is not None:
                good, bad = items(self.kind, data, self.key)
                for item in good:
                    # What was found fault with may come again put right, but not as it was.
                    fault = "this is what was found fault with" if item in refused else self.fault(item, there)
                    if fault:
                        bad.append(fault)
                    elif len(there) < self.total:
                        there = [*there, item]
                setattr(session.draft, self.key, there)
                session.complaints = bad
            session.took(self.step, len(there), self.total)

    def replace(self, session: Session[DraftT], faults: Mapping[int, str]) -> None:
        """Ask anew for the items, by their places, that the checks find fault with."""
        old: list[Any] = getattr(session.draft, self.key)
        faulty = [old[index] for index in faults]
        setattr(session.draft, self.key, [item for index, item in enumerate(old) if index not in faults])
        session.complaints = [
            f'"{in_short(getattr(old[index], "positive", old[index]), 100)}": {message}'
            for index, message in faults.items()
        ]
        try:
            self.gather(session, session.limits.repair_requests, faulty)
        finally:
            # A weak question is better than none: what was not replaced comes back, and is reported.
            new: list[Any] = getattr(session.draft, self.key)
            setattr(session.draft, self.key, [*new, *faulty[: self.total - len(new)]])
            session.complaints = []


@dataclass(frozen=True)
class Procedure(Generic[DraftT, Content]):
    """How a model writes a trait, or a role.

    Attributes:
        kind: What is written.
        draft: What it is written into.
        parts: What is asked for, in this order.
        check: What is wrong with the whole, given the draft.
        faults: Of that, what is wrong with which item of which part, by its key.
        checked_by: Options with which ``check`` does the same.
    """

    kind: Kind[Content]
    draft: type[DraftT]
    parts: tuple[Whole[DraftT] | Part[DraftT], ...]
    check: Callable[[Content, DraftT], list[Advice]]
    faults: Callable[[DraftT, Sequence[Advice]], Mapping[str, Mapping[int, str]]]
    checked_by: str = ""

    @property
    def lists(self) -> list[Part[DraftT]]:
        """The parts that are lists."""
        return [part for part in self.parts if isinstance(part, Part)]

    def plan(self, limits: Limits | None = None) -> list[PlannedStep]:
        """Say how many requests it takes, without asking anybody."""
        limits = limits or Limits()
        repairs = limits.repairs * len(self.lists) * limits.repair_requests
        return [*(part.planned(limits) for part in self.parts), PlannedStep("replacements", 0, repairs)]

    def write(self, session: Session[DraftT]) -> Written[Content]:
        """Let a model write what a draft lacks, and check the whole.

        Raises:
            AuthoringError: The author failed, or gave too little that is of use; the message says what is missing.
        """
        draft = session.draft
        for part in self.parts:
            part.write(session)
        content, advice = self._checked(draft)
        for _ in range(session.limits.repairs):
            faults = self.faults(draft, advice)
            for each in self.lists:
                if found := faults.get(each.key):
                    each.replace(session, found)
            if not any(faults.values()):
                break
            content, advice = self._checked(draft)
        if errors := [found for found in advice if found.severity is Severity.ERROR]:
            shown = "; ".join(f"{field_name(found.loc)} {found.message}" for found in errors)
            raise AuthoringError(f"the {self.kind.noun} {draft.name} cannot be used as it is: {shown}")
        return Written(content, tuple(advice), draft.requests)

    def _checked(self, draft: DraftT) -> tuple[Content, list[Advice]]:
        """What a finished draft makes, and what the checks find fault with."""
        try:
            content = self.kind.model.model_validate(draft.fields())
        except ValidationError as error:  # somebody has edited the draft of an interrupted run
            shown = "; ".join(f"{problem.field} {problem.message}" for problem in explain(error, {}, "", self.kind))
            raise AuthoringError(f"the {self.kind.noun} {draft.name} is not valid: {shown}") from error
        return content, self.check(content, draft)
