"""A few of the campaign's kills and failing disks, as a sample of what `make campaign` does."""

from __future__ import annotations

import os

import pytest

from tests.campaign import disks, kills

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def test_a_few_kills_leave_the_same_bytes() -> None:
    assert kills.attack(seed=3, size=2 / kills.KILLS).failures == []


def test_a_few_failing_disks_are_said_in_a_sentence() -> None:
    assert disks.attack(seed=5, size=3 / disks.FAILURES).failures == []
