"""Heat maps: the colour, the value and the text of a token are in the same place, whatever the text is."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from persona_lens import PersonaLensError
from persona_lens.data.pieces import TokenPiece, lines_of, token_pieces
from persona_lens.monitoring import TokenHeatmap
from persona_lens.monitoring.markup import DARK_INK, LIGHT_INK, STEPS, Scale, dark, light
from tests.data.test_pieces import TINY, bytes_of, token_id
from tests.data.tokenizers import TOKENIZERS
from tests.judging.test_agreement_blind import HOSTILE
from tests.reports.test_report import Page


class Tokens(Page):
    """A page whose token spans are gathered: their attributes, and the text within each."""

    def __init__(self, html: str) -> None:
        self.spans: list[tuple[dict[str, str | None], str]] = []
        self.wholes: list[str] = []
        self._within: list[str] = []
        super().__init__(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        super().handle_starttag(tag, attrs)
        found = dict(attrs)
        if tag == "span":
            kind = "token" if "data-token" in found else "whole" if found.get("class") == "whole" else ""
            self._within.append(kind)
            if kind == "token":
                self.spans.append((found, ""))
            elif kind == "whole":
                self.wholes.append("")

    def handle_endtag(self, tag: str) -> None:
        super().handle_endtag(tag)
        if tag == "span":
            self._within.pop()

    def handle_data(self, data: str) -> None:
        super().handle_data(data)
        if self._within and self._within[-1] == "token":
            attributes, text = self.spans[-1]
            self.spans[-1] = (attributes, text + data)
        elif self._within and self._within[-1] == "whole":
            self.wholes[-1] += data


def pieces_of(text: str) -> tuple[TokenPiece, ...]:
    return token_pieces(TINY, bytes_of(text))


def words(*texts: str) -> tuple[TokenPiece, ...]:
    """One token for each text."""
    return tuple(TokenPiece(text, place, (100 + place,)) for place, text in enumerate(texts))


def shade(attributes: dict[str, str | None]) -> str:
    return str(attributes["class"]).split()[1]


def printed(heatmap: TokenHeatmap, **options: Any) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=100, legacy_windows=False, **options)
    console.print(heatmap)
    return stream.getvalue()


# Alignment


def test_each_span_has_its_tokens_value_text_and_shade() -> None:
    heatmap = TokenHeatmap.of(
        words("The", " exam", " went", " well", "."), [-2.0, -1.0, 0.0, 0.5, math.nan], layers=[7]
    )
    spans = Tokens(heatmap.html()).spans
    assert [text for _, text in spans] == ["The", " exam", " went", " well", "."]
    assert [a["data-token"] for a, _ in spans] == ["0", "1", "2", "3", "4"]
    assert [a["data-value"] for a, _ in spans] == ["-2.0", "-1.0", "0.0", "0.5", "nan"]
    # 2 is the furthest from 0, so it has all 20 steps, 1 half of them, 0.5 a quarter.
    assert [shade(a) for a, _ in spans] == ["low-20", "low-10", "high-0", "high-5", "none"]
    assert spans[1][0]["title"] == "token 1 · id 101\nlayer 7 · −1.00\n exam"


def test_characters_of_several_tokens_have_a_cell_for_each_value() -> None:
    """``a😀b日``: one token, four, one, three."""
    values = [0.0, 1.0, 2.0, 3.0, 4.0, -1.0, -2.0, -3.0, -4.0]
    found = Tokens(TokenHeatmap.of(pieces_of("a😀b日"), values).html())
    assert [float(str(a["data-value"])) for a, _ in found.spans] == values
    assert [text for _, text in found.spans] == ["a", "", "", "", "", "b", "", "", ""]
    assert found.wholes == ["😀", "日"]
    shades = ["high-0", "high-5", "high-10", "high-15", "high-20", "low-5", "low-10", "low-15", "low-20"]
    assert [shade(a) for a, _ in found.spans] == shades
    assert [a.get("style") for a, _ in found.spans][1:5] == [f"grid-column:{n}" for n in (1, 2, 3, 4)]
    assert "token 3 (3 of 4 of one character) · id" in str(found.spans[3][0]["title"])
    assert str(found.spans[3][0]["title"]).endswith("+3.00\n😀")


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(sorted(TOKENIZERS)), st.data())
def test_any_text_of_any_tokenizer_is_aligned(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    pieces = token_pieces(tokenizer, ids)
    values = data.draw(st.lists(st.floats(allow_infinity=True), min_size=len(ids), max_size=len(ids)))
    found = Tokens(TokenHeatmap.of(pieces, values).html())
    assert [int(str(a["data-token"])) for a, _ in found.spans] == list(range(len(ids)))
    assert np.array_equal([float(str(a["data-value"])) for a, _ in found.spans], values, equal_nan=True)
    singles = {piece.start: piece.shown for piece in pieces if len(piece.ids) == 1}
    # A parser reads a carriage return as a line feed; none may be there.
    assert [text for _, text in found.spans] == [singles.get(index, "") for index in range(len(ids))]
    assert found.wholes == [piece.shown for piece in pieces if len(piece.ids) > 1]


def test_control_tokens_show_their_names() -> None:
    ids = [token_id("<|im_start|>"), *bytes_of("a\n")]
    spans = Tokens(TokenHeatmap.of(token_pieces(TINY, ids), [1.0, 2.0, 3.0]).html()).spans
    assert [text for _, text in spans] == ["<|im_start|>", "a", "↵\n"]
    assert ["control" in str(a["class"]) for a, _ in spans] == [True, False, False]


# Right to left


def test_runs_of_one_direction_are_isolated_and_in_their_order() -> None:
    pieces = words(
        "He", " said", " ", "مرحبا", " ", "بالعالم", " ", "12", " ", "שלום", " ", "ok", ".\n", "עב", " abc", "!"
    )
    lines = list(lines_of(pieces))
    assert [line.direction for line in lines] == ["ltr", "rtl"]
    assert [(run.direction, [piece.text for piece in run.pieces]) for run in lines[0].runs] == [
        ("ltr", ["He", " said", " "]), ("rtl", ["مرحبا", " ", "بالعالم"]), ("ltr", [" ", "12", " "]), ("rtl", ["שלום"]),
        ("ltr", [" ", "ok", ".\n"]),
    ]  # fmt: skip
    assert [(run.direction, [piece.text for piece in run.pieces]) for run in lines[1].runs] == [
        ("rtl", ["עב"]), ("ltr", [" abc"]), ("rtl", ["!"]),
    ]  # fmt: skip
    found = Tokens(TokenHeatmap.of(pieces, list(range(16))).html())
    assert [text for _, text in found.spans] == [piece.shown for piece in pieces]
    assert [a["dir"] for a in found.all("div") if a.get("class") == "line"] == ["ltr", "rtl"]


def test_letters_of_both_directions_in_one_token_cannot_reach_their_neighbours() -> None:
    pieces = words("שלום", "abcשלום", "שלום", "שלוםabc", "x")
    spans = Tokens(TokenHeatmap.of(pieces, [0.0] * 5).html()).spans
    assert [a.get("dir") for a, _ in spans] == [None, "auto", None, "auto", "auto"]


# Text of others


@pytest.mark.parametrize(
    "text", [*HOSTILE, "</style></span><script>alert(1)</script>", "\" onmouseover='x'", "&lt;&amp;"]
)
def test_hostile_text_is_shown_and_does_nothing(text: str) -> None:
    pieces = words(text, "end")
    heatmap = TokenHeatmap.of(pieces, {text: [1.0, math.nan]}, title=text)
    for html in (heatmap.html(), heatmap._repr_html_()):
        found = Tokens(html)
        assert not {tag for tag, _ in found.tags} & {"script", "img", "iframe", "object", "a"}
        assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
        assert [shown for _, shown in found.spans] == [piece.shown for piece in pieces]
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", html)
        html.encode()
    for output in (printed(heatmap), printed(heatmap, force_terminal=True, color_system="truecolor", no_color=False)):
        assert not re.search("[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202a-\u202e]", output)
        assert not re.search(r"\x1b(?!\[[\d;]*m)", output)


def test_the_page_is_complete_in_itself_and_repeats() -> None:
    heatmap = TokenHeatmap.of(words("a", "b"), [[1.0, 2.0], [3.0, 4.0]], layers=[3, 9], title="T")
    html = heatmap.html()
    assert html == heatmap.html()
    found = Tokens(html)
    assert "default-src 'none'" in html
    links = [value for _, attrs in found.tags for name, value in attrs.items() if name in ("href", "src")]
    assert links == ["data:,"]
    assert "url(" not in html
    assert heatmap._repr_html_() in html
    assert "<html" not in heatmap._repr_html_()


# Strips and scales


def test_layers_and_traits_are_strips_with_a_scale_for_each_trait() -> None:
    values = {"optimistic": torch.tensor([[1.0, 2.0], [4.0, -8.0]]), "evil": torch.tensor([[0.1, 0.2], [0.3, 0.4]])}
    heatmap = TokenHeatmap.of(words("a", "b"), values, layers=range(5, 7))
    assert [(s.trait, s.layer) for s in heatmap.strips] == [
        ("optimistic", 5),
        ("optimistic", 6),
        ("evil", 5),
        ("evil", 6),
    ]
    found = Tokens(heatmap.html())
    assert [a["data-token"] for a, _ in found.spans] == ["0", "1"] * 4
    assert [float(str(a["data-value"])) for a, _ in found.spans] == pytest.approx([1, 2, 4, -8, 0.1, 0.2, 0.3, 0.4])
    assert [shade(a) for a, _ in found.spans][:4] == ["high-2", "high-5", "high-10", "low-20"]
    assert shade(found.spans[-1][0]) == "high-20"
    assert [str(a["title"]).split("\n")[1] for a, _ in found.spans][3] == "optimistic · layer 6 · −8.00"
    rows = re.findall(r"<tr><td>(\d)</td><td>(\d+)</td>.*?((?:\s*<td>[^<]*</td>)+)\s*</tr>", heatmap._repr_html_())
    assert [re.findall("<td>(.*?)</td>", cells) for *_, cells in rows] == [
        ["+1.00", "+4.00", "+0.100", "+0.300"], ["+2.00", "−8.00", "+0.200", "+0.400"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "values", [[1, None, 3], (1.0, math.nan, 3.0), np.array([1, np.nan, 3]), torch.tensor([1, math.nan, 3]).bfloat16()]
)
def test_values_come_in_many_kinds(values: Any) -> None:
    (strip,) = TokenHeatmap.of(words("a", "b", "c"), values).strips
    assert np.array_equal(strip.values, [1, math.nan, 3], equal_nan=True)


def test_a_centre_and_a_limit_can_be_given() -> None:
    heatmap = TokenHeatmap.of(words("a", "b", "c"), {"x": [4.0, 5.0, 6.0]}, centre={"x": 5.0}, limit=2.0)
    assert [shade(a) for a, _ in Tokens(heatmap.html()).spans] == ["low-10", "high-0", "high-10"]
    assert heatmap.scales["x"].ends == ("+3.00", "+5.00", "+7.00")


def test_one_value_far_from_all_others_does_not_take_their_colour() -> None:
    """The first token of most models lies far out."""
    scale = Scale.of([5000.0, *[1.0, -1.0, 0.5, -0.5] * 10])
    assert scale.limit == 3.0
    assert scale.clipped
    assert scale.step(5000.0) == STEPS
    assert scale.ends == ("≤ −3.00", "0", "≥ +3.00")
    usual = Scale.of(np.random.default_rng(0).normal(size=1000).tolist())
    assert not usual.clipped


def test_an_attention_sink_takes_no_colour_from_a_short_text_of_several_layers() -> None:
    layers = [[5000.0, 1.0, -1.0, 0.5], [4000.0, 2.0, 1.0, -2.0], [3000.0, 0.5, 1.0, 0.5]]
    heatmap = TokenHeatmap.of(words("a", "b", "c", "d"), {"x": layers}, layers=[0, 1, 2])
    assert heatmap.scales["x"].limit == 6.0
    assert heatmap.scales["x"].clipped


@pytest.mark.parametrize(
    ("values", "limit"),
    [([], 1.0), ([0.0, 0.0], 1.0), ([math.nan], 1.0), ([0.0] * 20 + [3.0], 3.0), ([math.inf, 2.0], 2.0)],
)
def test_scales_of_odd_values(values: list[float], limit: float) -> None:
    scale = Scale.of(values)
    assert scale.limit == limit
    assert scale.clipped == (math.inf in values)
    assert scale.step(-math.inf) == -STEPS
    assert scale.step(math.nan) is None
    assert (scale.write(math.inf), scale.write(-0.0), scale.write(math.nan)) == ("+∞", "0.00", "none")


def _contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_text_is_legible_on_every_shade_and_the_ends_differ() -> None:
    for step in range(-STEPS, STEPS + 1):
        assert _contrast(light(step), LIGHT_INK) >= 4.5
        assert _contrast(dark(step), DARK_INK) >= 4.5
    for shades in (light, dark):
        assert len({shades(step) for step in range(-STEPS, STEPS + 1)}) == 2 * STEPS + 1
        blue, red = shades(-STEPS), shades(STEPS)
        assert int(blue[5:], 16) > int(blue[1:3], 16)
        assert int(red[1:3], 16) > int(red[5:], 16)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([1.0], {}, "the heat map has 1 values for 2 tokens"),
        ({"evil": [[1.0, 2.0], [1.0]]}, {"layers": [1, 2]}, "evil layer 2 has 1 values for 2 tokens"),
        ([[1.0, 2.0]], {}, "say which"),
        ([[1.0, 2.0]], {"layers": [1, 2]}, "2 layers for 1 rows"),
        ([[[1.0], [2.0]]], {"layers": [1]}, "values must be numbers"),
        ({}, {}, "at least one trait"),
        ([1.0, 2.0], {"limit": 0.0}, "limit must be above 0, got 0.0"),
        ([1.0, 2.0], {"centre": math.nan}, "centre must be a number"),
        ({"a": [1.0, 2.0]}, {"centre": {"b": 1.0}}, "no centre for 'a'; there are b"),
    ],
)
def test_what_does_not_fit_is_an_error(values: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PersonaLensError, match=re.escape(message)):
        TokenHeatmap.of(words("a", "b"), values, **options)


def test_pieces_must_begin_at_the_first_token() -> None:
    with pytest.raises(PersonaLensError, match="begins at 1 instead of 0"):
        TokenHeatmap.of(words("a", "b")[1:], [1.0])


# Terminal


def test_without_colours_each_token_has_its_number() -> None:
    heatmap = TokenHeatmap.of(pieces_of("a😀\nb"), [1.0, -0.25, 0.5, 0.0, math.nan, 0.125, -1.0], layers=[4], title="T")
    lines = [line.rstrip() for line in printed(heatmap).splitlines()]
    assert lines == [
        "T",
        "each token with its value, −1.00 to +1.00",
        "layer 4  a[+1.00]😀[−0.25 +0.50 0.00 none]↵[+0.12]",
        "         b[−1.00]",
        "several values: a character of several tokens",
    ]


def test_no_color_and_poor_terminals_get_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    heatmap = TokenHeatmap.of(words("a", "b"), [1.0, -1.0])
    assert "a[" not in printed(heatmap, force_terminal=True, color_system="256")
    assert "[+1.00]" in printed(heatmap, force_terminal=True, color_system="standard").replace("\x1b[2m", "")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "+1.00" in printed(heatmap, force_terminal=True, color_system="truecolor")


def test_in_colours_each_token_has_its_own() -> None:
    heatmap = TokenHeatmap.of(pieces_of("a😀b"), [-2.0, 2.0, 1.0, 0.0, -1.0, math.nan])
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor", no_color=False)
    lines = console.render_lines(heatmap, pad=False)
    tokens = [
        (s.text, s.style.bgcolor.name if s.style and s.style.bgcolor else None) for s in lines[1] if s.text.strip()
    ]
    assert tokens == [
        ("a", light(-20)), ("😀", light(20)), ("·", light(10)), ("·", light(0)), ("·", light(-10)), ("b", None),
    ]  # fmt: skip
