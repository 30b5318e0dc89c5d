"""Asking a model for one part of a draft after another, with what was wrong with its last reply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pydantic import BaseModel

from persona_lens.authoring import wording
from persona_lens.authoring.draft import Draft
from persona_lens.authoring.parsing import found_json, reply_schema
from persona_lens.authoring.plan import Limits
from persona_lens.authoring.protocol import Author, AuthoringError
from persona_lens.characters import in_short
from persona_lens.progress import Progress

_SHOWN_COMPLAINTS = 6


@dataclass
class Desk:
    """Where a draft is worked on.

    Attributes:
        author: Who writes.
        draft: What there is.
        limits: How often to ask.
        save: Called after every reply.
        progress: Told of the parts that are there.
        complaints: What was wrong with the last reply; the author is told.
    """

    author: Author
    draft: Draft
    limits: Limits
    save: Callable[[Draft], None]
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
        request += wording.again(self.complaints[:_SHOWN_COMPLAINTS])
        self.draft.requests += 1
        try:
            text = self.author.write(wording.SYSTEM, request, reply_schema(reply))
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
        self.save(self.draft)
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
