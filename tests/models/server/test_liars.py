"""A sample of the lies that the campaign tells (``make campaign``), each through a whole command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaign.peers import score_with
from tests.models.server.liars import LIES

SAMPLE = (
    "a body without end",
    "a bomb of gzip",
    "gzip that nobody asked for",
    "half a character",
    "the key and escapes in its words",
    "a wait of years",
    "a thinking model",
    "refusals of parameters",
    "another number than it was asked for",
    "null beside the answer",
)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_lie_ends_in_right_scores_or_in_words(name: str, tmp_path: Path) -> None:
    assert score_with(LIES[name], 0, tmp_path / "run") is None


def test_a_server_that_fails_late_is_quoted(tmp_path: Path) -> None:
    assert score_with(LIES["an error under 200"], 3, tmp_path / "run") is None
