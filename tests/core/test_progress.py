"""What long work shows of itself: bars where somebody looks, nothing elsewhere, from every verb that takes minutes."""

from __future__ import annotations

import inspect
import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

import persona_lens as pl
from persona_lens.backend.parity import check_parity
from persona_lens.core import progress
from persona_lens.core.progress import shown_progress
from tests.backends.fixtures import tiny_backend


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_for_each_piece_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for done in (2, 5, 8):
        shown_progress(done, 8, "steering rollouts")
    shown_progress(3, None, "tokens")
    shown_progress(0, 8, "steering rollouts")  # again, as after an error
    said = terminal.getvalue()
    assert said.count("steering rollouts: 100%") == 1
    assert "8/8" in said
    assert "steering rollouts:   0%" in said
    assert "tokens: 3" in said


def test_elsewhere_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    shown_progress(1, 2, "steering rollouts")
    assert stream.getvalue() == ""


def test_a_notebook_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    shell = type("ZMQInteractiveShell", (), {})()
    for found, looked_at in ((shell, True), (None, False)):
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda found=found: found))
        assert progress.somebody_looks() is looked_at


def verbs() -> dict[str, Any]:
    from persona_lens.analysis.capability import evaluate_capability
    from persona_lens.analysis.demo import run_demo
    from persona_lens.analysis.dissection import dissect
    from persona_lens.extraction import extract
    from persona_lens.finetuning import finetune
    from persona_lens.finetuning.shift import shift
    from persona_lens.finetuning.study import finetune_study
    from persona_lens.monitoring import study
    from persona_lens.screening import screen
    from persona_lens.steering import compare, tune
    from persona_lens.steering.crossing import effects

    every = (evaluate_capability, run_demo, extract, dissect, finetune, shift, finetune_study, study)
    return {verb.__name__: verb for verb in (*every, screen, effects, compare, tune, pl.sweep, pl.extract)}


def test_every_verb_shows_itself_by_default() -> None:
    silent = {
        name
        for name, verb in verbs().items()
        if inspect.signature(verb).parameters["progress"].default != shown_progress
    }
    assert silent == set()


def test_a_parity_check_says_how_many_checks_are_done() -> None:
    told: list[tuple[int, int | None, str]] = []
    checks = check_parity(tiny_backend("transformers"), max_new_tokens=2, progress=lambda *each: told.append(each))
    assert told == [(n, len(checks), "checking transformers") for n in range(len(checks) + 1)]
