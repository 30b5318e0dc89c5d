"""Whether replies of a server are steered is made sure of before it listens."""

from __future__ import annotations

from typing import Any

import pytest

from persona_lens.backend.continuous.rows import RowsRun
from persona_lens.backend.verification import VerificationError
from persona_lens.monitoring.reply import watched_reply
from persona_lens.serve import workbench as module
from tests.serve.running import workbench


@pytest.mark.parametrize("adapter", ["transformers", "nnsight"])
def test_replies_of_a_sound_server_are_steered(adapter: str) -> None:
    workbench(adapter).verify()


def test_a_conversation_that_forgets_its_edits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "conversation_edits", lambda *_: [])
    with pytest.raises(VerificationError, match=r"the reply to a conversation is steered along evil@1: .* measured 0 "):
        workbench().verify()


def test_a_reply_that_forgets_its_edits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetting(backend: Any, meter: Any, prompt: Any, sampling: Any, edits: Any, **more: Any) -> Any:
        return watched_reply(backend, meter, prompt, sampling, (), **more)

    monkeypatch.setattr(module, "watched_reply", forgetting)
    with pytest.raises(VerificationError, match="the reply to a conversation is steered along"):
        workbench().verify()


def test_rows_that_run_together_without_their_edits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the engine of a server runs them so; the model by itself is as it should be."""
    made = RowsRun.__init__

    def without(self: Any, tokens: Any, edits: Any, reads: Any, **more: Any) -> None:
        made(self, tokens, (), reads, **more)

    monkeypatch.setattr(RowsRun, "__init__", without)
    with pytest.raises(VerificationError, match=r"an edit that cannot be made is an error.* checks fail"):
        workbench().verify()
