"""The text of tokens as they come: `GrowingText`, and the texts at which it ends, `StopTexts`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class GrowingText:
    """Text of tokens that come one by one, told whole characters at a time.

    What a token adds may depend on those before it, so a few of them are written out again with it.

    Args:
        tokenizer: The model's own.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._from = self._told = 0  # tokens that are written out again, and those whose text was told

    def add(self, token: int) -> str:
        """What becomes whole with the next token; often nothing."""
        self._ids.append(token)
        return self._fresh(at_last=False)

    def end(self) -> str:
        """The rest, whole or not: there is no more."""
        return self._fresh(at_last=True)

    def _fresh(self, *, at_last: bool) -> str:
        before, now = self._text(self._ids[self._from : self._told]), self._text(self._ids[self._from :])
        if len(now) <= len(before) or (now.endswith(UNFINISHED) and not at_last):
            return ""
        self._from, self._told = self._told, len(self._ids)
        return now[len(before) :]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class StopTexts:
    """Lets text through up to the first of some texts; what may be the beginning of one waits.

    Args:
        stops: The texts, none of them empty.

    Attributes:
        met: Whether one has come; nothing follows then.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.met = False

    def add(self, text: str) -> str:
        """What may be told of the text so far and was not."""
        if self.met:
            return ""
        held = self._held + text
        found = [at for at in (held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.met, self._held = True, ""
            return held[: min(found)]
        begun = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - begun :]
        return held[: len(held) - begun]

    def end(self) -> str:
        """What waited: there is no more."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How much of the end of a text may be the beginning of another."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
