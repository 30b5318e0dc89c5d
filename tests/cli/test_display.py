"""Progress in the terminal, and without one."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from persona_lens.cli.display import showing_progress


@pytest.mark.parametrize(("of_bytes", "amount"), [(True, "2.0/4.0 MB"), (False, "2000000/4000000")])
def test_bars_are_drawn_in_a_terminal(of_bytes: bool, amount: str) -> None:
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with showing_progress(of_bytes=of_bytes, screen=console) as report:
        report(1_000_000, None, "fetching")
        report(2_000_000, 4_000_000, "fetching")
    assert "fetching" in screen.getvalue()
    assert amount in screen.getvalue()


def test_work_that_is_not_counted_has_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    screen = StringIO()
    with showing_progress(screen=Console(file=screen, force_terminal=True, width=120)) as report:
        report(0, None, "opening")
    assert "opening" in screen.getvalue()
    assert "0/" not in screen.getvalue()
    with showing_progress(screen=Console(file=StringIO())) as report:
        report(0, None, "opening")
        report(3, None, "tokens")
    assert capsys.readouterr().err == "opening\ntokens: 3\n"


def test_without_a_terminal_there_are_few_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with showing_progress(screen=Console(file=StringIO())) as report:
        for done in range(1001):
            report(done, 1000, "rollouts")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "rollouts: 0 of 1,000"
    assert lines[-1] == "rollouts: 1,000 of 1,000"
    assert len(lines) == 11
