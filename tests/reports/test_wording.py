"""Sentences and numbers in what is printed: punctuation, plurals, signs, and titles that tell things apart."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from persona_lens.backend import BackendError, find_backend
from persona_lens.cli.generate import _show
from persona_lens.cli.options.steerings import Candidate
from persona_lens.core.text import counted
from persona_lens.reports.page import addend, measured

ENGINE = Path(__file__).resolve().parents[2] / "persona_lens"


def test_an_unknown_backend_is_told_in_whole_sentences() -> None:
    with pytest.raises(BackendError, match=r"^no backend named 'zzz'; installed: \w+"):
        find_backend("zzz")
    with pytest.raises(BackendError, match=r"^no backend named 'nnsigth'; did you mean nnsight\? Installed: \w+"):
        find_backend("nnsigth")


def test_a_hint_that_may_be_empty_leaves_no_sentence_without_an_end() -> None:
    """``{hint} It takes`` behind a hint that may be nothing."""
    for path in ENGINE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"[^.}\s]\{(\w+)\} [A-Z]\w+ ", text):
            assert not re.search(rf"\b{name} = f?\"[^\n]*\" if [^\n]* else \"\"$", text, re.MULTILINE), path


def test_one_of_a_thing_is_no_plural() -> None:
    assert [counted(n, "seed") for n in (0, 1, 2, 1250)] == ["0 seeds", "1 seed", "2 seeds", "1,250 seeds"]


@pytest.mark.parametrize("noun", ["seeds", "questions", "prompts", "layers", "requests", "conversations", "tokens"])
def test_what_commands_say_counts_with_one_function(noun: str) -> None:
    """A number in front of a plural, at the beginning of a text or after a comma: that may be a one."""
    pattern = re.compile(rf"(?:f\"|, |over |in ){{[^{{}}]*}} {noun}\b")
    for path in (ENGINE / "cli").glob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not pattern.search(line), f"{path.name}: {line.strip()}"


def test_what_is_added_has_one_sign() -> None:
    assert (addend(0.861, 3), addend(-0.861, 3)) == ("+ 0.861", "\N{MINUS SIGN} 0.861")


def test_a_measure_without_an_interval_says_why() -> None:
    none = {"low": None, "high": None}
    assert measured({"value": 0.5, **none}) == "0.50 (no interval)"
    assert measured({"value": 0.5, **none, "reason": "one question"}) == "0.50 (one question)"
    assert measured({"value": None, **none}) == "\N{EN DASH} (not defined, for lack of variation)"


def test_replies_that_differ_at_the_end_of_their_names_can_be_told_apart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    long = "optimistic@10-20:increments(+2) on response schedule(0:1 20:0), impolite@18:ablate"
    shown = [Candidate(f"{long}, evil@18:{end}", None, None) for end in ("-1", "-2", "-3")]
    _show(shown, ["a", "b", "c"])
    said = capsys.readouterr().out
    assert all(f"evil@18:{end}" in re.sub(r"[\s\u2502]+", "", said) for end in ("-1", "-2", "-3"))
