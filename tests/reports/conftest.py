"""Pages without their figures, which take a second to draw."""

from __future__ import annotations

import pytest
from markupsafe import Markup
from matplotlib.figure import Figure

from persona_lens.reports import svg


@pytest.fixture
def drawing() -> None:
    """The figures are drawn in this test."""


@pytest.fixture
def drawing_wide(drawing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures are drawn for a wide page only, which is enough to see whether they change."""
    whole = svg.to_svg

    def to_svg(figure: Figure, name: str) -> Markup:
        return whole(figure, name) if figure.get_figwidth() * 72 > svg.NARROW else Markup("")

    monkeypatch.setattr(svg, "to_svg", to_svg)


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests are about words."""
    if "drawing" not in request.fixturenames:
        empty = svg.Drawing(Markup("<svg></svg>"), Markup("<svg></svg>"))
        monkeypatch.setattr(svg, "Drawn", lambda wanted: dict.fromkeys(wanted, empty))
