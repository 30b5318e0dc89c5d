"""Pages without their figures, which take a second to draw."""

from __future__ import annotations

import pytest
from markupsafe import Markup

from persona_lens.reports import svg


@pytest.fixture
def drawing() -> None:
    """The figures are drawn in this test."""


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests are about words."""
    if "drawing" not in request.fixturenames:
        empty = svg.Drawing(Markup("<svg></svg>"), Markup("<svg></svg>"))
        monkeypatch.setattr(svg, "drawn", lambda wanted: dict.fromkeys(wanted, empty))
