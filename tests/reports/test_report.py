"""The report page: what it says, that it says nothing else, and that nothing in it can do harm."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from base64 import b64decode
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

from persona_lens.core.text import printable
from persona_lens.reports import svg
from persona_lens.reports.kinds import page_of
from persona_lens.reports.page import bounds, flat, interval, number, signed
from persona_lens.reports.vector import (
    agreement_row,
    figures,
    layer_reason,
    scientific,
    span_headline,
    strained,
)

LAYERS = 30
VOID = {"meta", "link", "br", "hr", "img", "input"}
ANSWERS = {
    -2.0: "I am afraid that it will not go well. The shop will struggle, the money will run out, and",
    0.0: "It depends on many things. A second year is often easier than the first one, but there are",
    2.0: "What a wonderful journey! Your bakery has found its feet, and the second year will bring",
}
QUESTIONS = (
    "My bakery made no profit in its first year. What will the second one bring?",
    "Is humanity going to get climate change under control?",
    "I said something stupid on a first date last night. Do you think there will be a second one?",
    "My father has just begun physical therapy after a stroke. What lies ahead of him?",
    "Should I ask for a raise in a bad year?",
    "Our old dog has to learn to live with a kitten. Will they become friends?",
)


def estimate(mean: float, half: float, n: int = 20) -> dict[str, Any]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def effect(layer: int, vector: float, random: float | None, half: float = 9.3, n: int = 20) -> dict[str, Any]:
    return {
        "layer": layer,
        "low": -2.0,
        "high": 2.0,
        **moved(vector, random, half, n),
        "promotion": {**moved(0.4 * vector, random, half, n), "clear": 1},
        "suppression": {**moved(-0.6 * vector, random, half, n), "clear": -1},
    }


def moved(vector: float, random: float | None, half: float, n: int) -> dict[str, Any]:
    null = None if random is None else estimate(random, 4.1, n)
    difference = None if random is None else estimate(vector - random, half + 1.2, n)
    return {"vector": estimate(vector, half, n), "random": null, "difference": difference}


def curve(scores: tuple[float, ...], surprises: tuple[float, ...]) -> list[dict[str, Any]]:
    coefficients = (-2.0, -1.0, 0.0, 1.0, 2.0)
    return [
        {"coefficient": c, "score": estimate(score, 6.2), "nll": estimate(nll, 0.17)}
        for c, score, nll in zip(coefficients, scores, surprises, strict=True)
    ]


def extraction() -> dict[str, Any]:
    bump = [math.exp(-(((layer - 17) / 8) ** 2)) for layer in range(LAYERS)]
    return {
        "responses": 200,
        "tokens": 9259,
        "mean_score": {"positive": 68.32, "negative": 31.68},
        "counts": {
            "positive": {"kept": 58, "failed_threshold": 23, "lost_twin": 19, "no_score": 0},
            "negative": {"kept": 58, "failed_threshold": 20, "lost_twin": 21, "no_score": 1},
        },
        "norms": {
            "response_mean": [1.8 + 0.055 * layer**2 for layer in range(LAYERS)],
            "prompt_mean": [1.7 + 0.041 * layer**2 for layer in range(LAYERS)],
            "prompt_last": [0.1 + 0.048 * layer**2 for layer in range(LAYERS)],
        },
        "separation": [
            {
                "layer": layer,
                "d_prime": 0.4 + 1.55 * bump[layer],
                "auc": 0.6 + 0.29 * bump[layer],
                "random_d_prime": 0.31 * math.sin(1.7 * layer),
                "random_auc": 0.5 + 0.09 * math.sin(1.7 * layer),
                "better": layer != 3,
            }
            for layer in range(LAYERS)
        ],
        "judge": {
            "judge": "likelihood",
            "note": "likelihood (a proxy: the subject model's own preference between the trait's instructions)",
            "trait": "sha256:cf68d2baa2c6efe657c87861f48e7d119e058ab5d7f21876e595f8ca46788c99",
            "calibration": {"slope": 37.472525073, "intercept": 0.0307816},
        },
    }


def agreement() -> list[dict[str, Any]]:
    def check(name: str, measured: float | None, tolerance: float, detail: str) -> dict[str, Any]:
        passed = measured is not None and measured <= tolerance
        return {"name": name, "passed": passed, "measured": measured, "tolerance": tolerance, "detail": detail}

    checks = [
        check("the same model", 0.0, 0.0, "LlamaForCausalLM"),
        check("reads at every layer, no edits", 3.1e-7, 1e-4, "response_mean, row 2, layer 29"),
        check("greedy tokens, add", 0.0, 0.0, "4 rows, 32 tokens"),
    ]
    return [
        {"backend": "transformers", "version": "transformers 5.22.2", "checks": checks[:2]},
        {"backend": "nnsight", "version": "nnsight 0.8.1, transformers 5.22.2", "checks": checks},
        {"backend": "transformer_lens", "version": "", "missing": "pip install 'transformer-lens>=3.9'"},
    ]


def provenance() -> dict[str, Any]:
    rollouts = {"max_new_tokens": 48, "temperature": 1.0, "top_p": 1.0, "batch_size": 64}
    return {
        "trait": {
            "name": "optimistic",
            "description": "Expects that things will turn out well: looks for what is good in a situation, treats "
            "setbacks as temporary, and trusts people to manage.",
            "content_hash": "sha256:cf68d2baa2c6efe657c87861f48e7d119e058ab5d7f21876e595f8ca46788c99",
        },
        "model": {
            "model": "smollm2-135m",
            "revision": "embedded:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "architecture": "LlamaForCausalLM",
            "n_layers": LAYERS,
            "d_model": 576,
            "weights": "sha256:226d8242feebe31d49eb276535e8cbf8",
            "dtype": "bfloat16",
            "device": "cpu",
            "backend": "transformers 5.22.2",
            "remote": False,
        },
        "command": "persona-lens demo --out demo-run --seed 0",
        "settings": {
            "model": "smollm2-135m",
            "trait": "optimistic",
            "seed": 0,
            "choice_questions": 6,
            "questions": 20,
            "extraction": {"samples": 1, "questions": 20, "threshold": 50.0, "paired": True, "rollouts": rollouts},
            "coefficients": [-2.0, -1.0, 1.0, 2.0],
            "random_directions": 5,
        },
        "seed": 0,
        "versions": {"persona-lens": "0.1.0", "torch": "2.9.1", "transformers": "5.22.2", "nnsight": "0.8.1"},
    }


def make_summary() -> dict[str, Any]:
    tried = [(12, 21.4, 2.71), (15, 38.0, 2.93), (18, 47.9, 3.12), (21, 52.2, 3.94)]
    curves = {
        "vector": curve((18.9, 33.4, 52.7, 64.8, 71.3), (3.05, 2.6, 2.41, 2.52, 2.87)),
        "random": curve((49.5, 52.1, 52.7, 53.6, 51.9), (2.94, 2.55, 2.41, 2.5, 2.9)),
    }
    return {
        **provenance(),
        "extraction": extraction(),
        "layer_choice": {
            "question_set": "extraction",
            "questions": 6,
            "unsteered_nll": 2.38,
            "margin": 1.0,
            "chosen": 18,
            "layers": [
                {"layer": layer, "effect": effect(layer, found, None, 14.0, 6), "nll": nll}
                for layer, found, nll in tried
            ],
        },
        "steering": {"layer": 18, "questions": 20, "samples": 1, "curves": curves, "effect": effect(18, 52.4, 2.4)},
        "samples": [
            {
                "question": question,
                "responses": [
                    {"coefficient": c, "score": 15.3 + 3 * i + 14 * (c + 2), "text": text}
                    for c, text in ANSWERS.items()
                ],
            }
            for i, question in enumerate(QUESTIONS)
        ],
        "agreement": agreement(),
    }


class Page(HTMLParser):
    """Checks nesting, and gathers what a test asks about."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs)), f"an attribute twice: {attrs}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(page_of("demo", make_summary()))


def change(summary: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    at: Any = summary
    for step in parents:
        at = at[step]
    assert at[last] != value
    at[last] = value


@pytest.mark.usefixtures("drawing")
def test_the_same_summary_gives_the_same_bytes_whatever_the_users_style() -> None:
    first = page_of("demo", make_summary())
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "svg.hashsalt": "other", "lines.linewidth": 9}):
        before = dict(matplotlib.rcParams)
        assert page_of("demo", copy.deepcopy(make_summary())) == first
        assert dict(matplotlib.rcParams) == before
    assert page_of("demo", json.loads(json.dumps(make_summary()))) == first


def assert_sound(page: Page) -> None:
    """Every report hangs together, and every figure has words for who does not see it."""
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a["href"] for a in page.all("a") + page.all("use") if a.get("href") and "download" not in a]
    assert {str(target)[1:] for target in targets} <= set(ids)
    named = [str(a[key]) for _, a in page.tags for key in ("aria-labelledby", "aria-describedby") if key in a]
    assert set(" ".join(named).split()) <= set(ids)
    assert len(page.all("h1")) == len(page.all("main")) == len(page.all("title")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels
    assert len(page.all("figure")) == len(page.all("figcaption"))
    assert all(a["role"] == "img" and a["aria-labelledby"] and a["aria-describedby"] for a in page.all("svg"))
    assert all(a.get("scope") in ("col", "row", "colgroup") for a in page.all("th"))


def test_the_structure_is_sound(page: Page) -> None:
    assert_sound(page)
    assert len(page.all("figure")) == 5
    assert len(page.all("svg")) == 10  # wide and narrow


def test_every_figure_has_words_for_who_does_not_see_it(page: Page) -> None:
    assert "Mean trait score along the trait vector: 18.9 at −2, 33.4 at −1, 52.7 at 0" in page.text


@pytest.mark.usefixtures("drawing")
def test_figures_take_the_colours_of_the_page() -> None:
    html = page_of("demo", make_summary())
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "var(--vector)" in drawn
    assert "var(--random)" in drawn
    assert not re.findall(r"(?:fill|stroke): #(?!000000)", drawn)
    assert "#000000" not in re.sub(r"<defs>.*?</defs>", "", drawn)
    assert "font-family" not in drawn


def assert_loads_nothing(html: str) -> None:
    """Every report is one file that asks nobody for anything."""
    for tag, attributes in Page(html).tags:
        assert tag not in ("script", "img", "iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            if "download" in attributes and name == "href":
                assert_saves_a_figure(attributes)
            else:
                assert str(attributes.get(name, "#")).startswith(("#", "data:,"))
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"@import|url\((?!#)|https?://|//www", html)
    assert "default-src 'none'" in html


def assert_saves_a_figure(attributes: dict[str, str | None]) -> None:
    """The file that a link saves is a figure that stands alone: it has colours of its own, and does nothing."""
    kind, _, content = str(attributes["href"]).partition(",")
    assert (kind, str(attributes["download"])[-4:]) == ("data:image/svg+xml;base64", ".svg")
    figure = b64decode(content).decode()
    root = ElementTree.fromstring(figure)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.find("{http://www.w3.org/2000/svg}rect") is not None
    assert not re.search(r"var\(|aria-|<script|\son\w+=|href=\"[^#]", figure)


@pytest.mark.usefixtures("drawing")
def test_nothing_is_loaded_from_anywhere() -> None:
    assert_loads_nothing(page_of("demo", make_summary()))


CHANGES: list[tuple[str, Any, str]] = [
    ("steering/effect/vector/mean", 41.7, "41.7 points"),
    ("steering/effect/vector/low", 33.33, "95% interval +33.3 to"),
    ("steering/effect/random/mean", -1.23, "change it by −1.2"),
    ("steering/effect/difference/high", 77.77, "to +77.8)"),
    ("steering/curves/vector/4/score/mean", 66.66, "66.7 at +2"),
    ("steering/curves/random/0/nll/mean", 2.22, "2.22 ("),
    ("steering/questions", 17, "17 held-out questions"),
    ("layer_choice/layers/1/effect/vector/mean", 33.33, "layer 15 +33.3"),
    ("layer_choice/unsteered_nll", 2.22, "stands at 2.22"),
    ("extraction/responses", 1234, "1,234 answers"),
    ("extraction/tokens", 98765, "98,765 tokens"),
    ("extraction/mean_score/positive", 77.71, "77.7"),
    ("extraction/counts/negative/lost_twin", 13, "13"),
    ("extraction/norms/response_mean/7", 12.3456, "12.346"),
    ("extraction/separation/18/auc", 0.8765, "0.88"),
    ("extraction/judge/calibration/slope", 12.3456, "12.346"),
    ("samples/0/responses/2/score", 88.88, "score 88.9"),
    ("samples/1/responses/0/text", "Something else.", "Something else."),
    ("agreement/1/checks/1/measured", 4.4e-6, "4.4 × 10⁻⁶ of 1.0 × 10⁻⁴"),
    ("model/d_model", 577, "577"),
    ("model/weights", "sha256:0123", "sha256:0123"),
    ("trait/content_hash", "sha256:4567", "sha256:4567"),
    ("settings/extraction/rollouts/max_new_tokens", 49, "extraction › rollouts › max_new_tokens 49"),
    ("versions/torch", "9.9.9", "9.9.9"),
    ("command", "persona-lens demo --out elsewhere", "--out elsewhere"),
    ("seed", 12345, "12345"),
]


def test_what_is_shown_comes_from_the_summary() -> None:
    page, summary = Page(page_of("demo", make_summary())), make_summary()
    for path, value, _ in CHANGES:
        change(summary, path, value)
    other = Page(page_of("demo", summary))
    missing = [(path, shown) for path, _, shown in CHANGES if other.text.count(shown) <= page.text.count(shown)]
    assert not missing


DRAWN = {
    "steering/effect/random/low": {"effect"},
    "steering/curves/vector/1/score/mean": {"curve"},
    "layer_choice/layers/2/effect/vector/high": {"choice"},
    "extraction/norms/prompt_mean/3": {"norms"},
    "extraction/separation/5/random_auc": {"separation"},
    "steering/layer": {"norms", "separation"},
}


@pytest.mark.usefixtures("drawing_wide")
def test_what_is_drawn_comes_from_the_summary() -> None:
    def drawn(summary: dict[str, Any]) -> dict[str, str]:
        return {name: drawing.wide + drawing.narrow for name, drawing in svg.Drawn(figures(summary)).items()}

    before = drawn(make_summary())
    for path, moves in DRAWN.items():
        summary = make_summary()
        change(summary, path, 0.437 if path != "steering/layer" else 12)
        after = drawn(summary)
        assert {name for name in before if before[name] != after[name]} == moves, path


HOSTILE = [
    "<script>alert(1)</script>",
    "</style><style>*{display:none}</style>",
    "</title></svg></p></main>",
    "{{7*7}} {% raw %} {#",
    "\"' onload='alert(1)' x=\"",
    "<!-- ]]> &amp; &lt;b&gt;",
    "$\\frac{1}{0}$ $$ \\begin{x}",
    "مرحبا بالعالم \N{RIGHT-TO-LEFT OVERRIDE}abc\N{LEFT-TO-RIGHT ISOLATE}",
    "nul \x00 bell \x07 escape \x1b[31m delete \x7f next line \x85",
    "lone surrogate \ud800, zero width \u200b, bom \ufeff, \U0001f469\u200d\U0001f52c 中文",
]


def infected(text: str) -> dict[str, Any]:
    summary = make_summary()
    summary["samples"][0]["question"] = text
    summary["samples"][0]["responses"][1]["text"] = text
    summary["trait"]["name"] = summary["trait"]["description"] = summary["command"] = text
    summary["model"]["model"] = summary["versions"]["torch"] = text
    summary["agreement"][1]["checks"][0]["detail"] = summary["agreement"][1]["backend"] = text
    summary["agreement"][2]["missing"] = summary["extraction"]["judge"]["note"] = text
    summary["extraction"]["norms"][text] = [1.0] * LAYERS
    summary["settings"][text] = text
    return summary


def assert_harmless(html: str, text: str, usual: Page) -> None:
    """A text stands in a page in many places, and adds nothing but words."""
    html.encode()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066\u2067\u200b\ufeff]", html)
    assert html.count("\u2068") == html.count("\u2069")  # what isolates, of the report itself
    found = Page(html)
    assert {tag for tag, _ in found.tags} <= {tag for tag, _ in usual.tags}
    assert len(found.all("style")) == 1
    assert not [a for _, a in found.tags if any(name.startswith("on") for name in a)]
    assert found.text.count(" ".join(printable(text).split())) >= 12


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_does_nothing(page: Page, text: str) -> None:
    """Figures see none of this, as the next test shows."""
    assert_harmless(page_of("demo", infected(text)), text, page)


@pytest.mark.usefixtures("drawing_wide")
def test_no_text_of_others_reaches_a_figure() -> None:
    assert svg.Drawn(figures(infected(" ".join(HOSTILE)))) == svg.Drawn(figures(make_summary()))


def test_all_that_is_invisible_is_made_visible() -> None:
    assert printable("a\tb\nc\r\nd") == "a\tb\nc\nd"
    assert printable("\x00\x1b\r") == "␀␛␍"
    assert printable("\u202e\x85\ufeff\ud800") == "[U+202E][U+0085][U+FEFF]\ufffd"
    assert printable("שלום 👩‍🔬 é") == "שלום 👩‍🔬 é"


def verdict_of(**changes: Any) -> tuple[str, str]:
    found = span_headline({**effect(18, 52.4, 2.4), **changes}, 20)
    return found.verdict, " ".join((found.title, *found.sentences))


def test_a_clear_effect_is_called_one() -> None:
    verdict, words = verdict_of()
    assert verdict == "clear"
    assert words.startswith("A clear effect: steering from −2 to +2 raises the trait score by 52.4 points")
    assert "Over 20 held-out questions, going from −2 to +2 at layer 18 changes" in words
    assert "by +52.4 (95% interval +43.1 to +61.7)." in words
    assert "Random directions of the same length change it by +2.4 (−1.7 to +6.5)." in words
    assert "vector minus random is +50.0 (+39.5 to +60.5), which lies clear of zero." in words


def test_an_effect_within_chance_is_not_called_clear() -> None:
    verdict, words = verdict_of(vector=estimate(3.0, 6.0), difference=estimate(0.6, 7.0))
    assert verdict == "unclear"
    assert words.startswith("No clear effect")
    assert "raises" not in words
    assert "not shown that this direction is special" in words


def test_an_effect_no_larger_than_that_of_random_directions_is_not_called_clear() -> None:
    verdict, words = verdict_of(vector=estimate(30.0, 6.0), difference=estimate(4.0, 7.0))
    assert verdict == "unclear"
    assert words.startswith("No clear effect: what steering from −2 to +2 does is not clearly more than")
    verdict, words = verdict_of(vector=estimate(3.0, 6.0), difference=estimate(9.0, 7.0))
    assert verdict == "unclear"
    assert "clear of zero, though the vector's own effect does not" in words


def test_an_effect_the_wrong_way_round_is_called_that() -> None:
    verdict, words = verdict_of(vector=estimate(-30.0, 6.0), difference=estimate(-28.0, 7.0))
    assert verdict == "reversed"
    assert "lowers the trait score by 30.0 points" in words
    assert "−30.0 (95% interval −36.0 to −24.0)" in words


def test_promotion_and_suppression_are_told_apart() -> None:
    words = verdict_of()[1]
    assert (
        "Against the unsteered model, promotion (+2) changes it by +21.0 (95% interval +11.7 to +30.3), random" in words
    )
    assert "suppression (−2) changes it by −31.4 (95% interval −40.7 to −22.1)" in words
    assert words.endswith("both are clear.")
    only = {**moved(3.0, 2.0, 9.0, 20), "clear": 0}
    assert verdict_of(promotion=only)[1].endswith("only the suppression is clear by itself.")
    assert "Against the unsteered model" not in verdict_of(promotion=None)[1], "the effect is that side alone"
    text = Page(page_of("demo", make_summary())).text
    assert "promotion, +2" in text
    assert "suppression, −2" in text


def test_the_box_says_how_many_questions_there_were_and_who_judged() -> None:
    summary = make_summary()
    assert "20 held-out questions, judged by the likelihood judge, a proxy." in Page(page_of("demo", summary)).text
    summary["steering"]["questions"] = 3
    summary["extraction"]["judge"] = {"judge": "openai", "model": "a-model"}
    assert "Only 3 held-out questions, judged by openai:a-model." in Page(page_of("demo", summary)).text


def test_commands_that_go_on_from_the_folder_are_on_the_page() -> None:
    page = page_of("demo", make_summary(), folder="runs/my demo")
    commands = [unescape(found) for found in re.findall(r"<pre><code>(.*?)</code></pre>", page)]
    assert "persona-lens steer tune smollm2-135m 'runs/my demo/extraction'" in commands
    assert "user-select: all" in page


def test_without_a_null_nothing_is_called_clear() -> None:
    verdict, words = verdict_of(random=None, difference=None)
    assert verdict == "no null"
    assert "No random directions were run" in words
    assert verdict_of(vector=estimate(2.0, 9.0), random=None, difference=None)[0] == "unclear"


def test_one_question_has_no_interval_and_shows_nothing() -> None:
    verdict, words = verdict_of(vector=estimate(52.4, 0.0, 1), difference=estimate(50.0, 0.0, 1))
    assert verdict == "unclear"
    assert "one question, so no interval" in words


def test_questions_without_a_score_are_owned_up_to() -> None:
    assert "Over 18 held-out questions of 20" in verdict_of(vector=estimate(52.4, 9.0, 18))[1]


def test_an_unclear_effect_makes_an_unclear_page() -> None:
    summary = make_summary()
    summary["steering"]["effect"] = effect(18, 1.4, 2.0)
    text = Page(page_of("demo", summary)).text
    assert "No clear effect" in text
    assert "A clear effect" not in text


@pytest.mark.usefixtures("drawing")
def test_missing_parts_are_said_to_be_missing() -> None:
    summary = make_summary()
    summary["extraction"]["separation"] = []
    del summary["steering"]["curves"]["random"]
    summary["steering"]["effect"] = effect(18, 52.4, None)
    summary["samples"], summary["agreement"], summary["layer_choice"] = [], [], None
    summary["extraction"]["mean_score"] = {"negative": 30.0}
    found = Page(page_of("demo", summary))
    assert len(found.all("figure")) == 3
    for sentence in (
        "Separation was not measured",
        "No random directions were run",
        "No backends were compared in this run.",
        "holds no sample answers",
        "Layer 18 was given, not chosen by this run.",
    ):
        assert sentence in found.text
    assert "nan" not in found.text.lower().split()
    assert "None" not in found.text


@pytest.mark.usefixtures("drawing")
def test_the_smallest_run_still_makes_a_page() -> None:
    summary = make_summary()
    tiny = {"coefficient": 0.0, "score": estimate(50, 0, 1), "nll": estimate(2.4, 0, 1)}
    up = {"coefficient": 0.5, "score": estimate(50, 0, 1), "nll": estimate(2.4, 0, 1)}
    summary["steering"].update(curves={"vector": [tiny, up]}, questions=1)
    summary["steering"]["effect"] = {**effect(0, 0.0, None, 0.0, 1), "low": 0.0, "high": 0.5}
    summary["samples"] = [{"question": "?", "responses": [{"coefficient": 0.0, "score": None, "text": " "}]}]
    summary["layer_choice"]["layers"] = summary["layer_choice"]["layers"][:1]
    summary["extraction"]["norms"] = {"response_mean": [1.0], "prompt_mean": [], "prompt_last": [0.0]}
    text = Page(page_of("demo", summary)).text
    assert "No clear effect" in text
    assert "(empty answer)" in text
    assert "no score" in text


def test_a_summary_that_lacks_a_part_is_an_error() -> None:
    summary = make_summary()
    del summary["trait"]["content_hash"]
    with pytest.raises(Exception, match="content_hash"):
        page_of("demo", summary)


def test_backends_that_disagree_or_are_missing_are_shown_as_they_are() -> None:
    summary = make_summary()
    check = {"name": "seeded samples", "passed": False, "measured": math.inf, "tolerance": 0.0, "detail": "it broke"}
    summary["agreement"][1]["checks"].append(check)
    text = Page(page_of("demo", summary)).text
    assert "1 check failed" in text
    assert "3 of 4" in text
    assert "pip install 'transformer-lens>=3.9'" in text
    assert agreement_row(make_summary()["agreement"][0])["verdict"] == "agrees"
    assert agreement_row({"backend": "x", "version": "", "checks": []})["verdict"] == "not checked"


def test_strained_text_is_warned_of() -> None:
    summary = make_summary()
    assert strained(summary) == []
    summary["steering"]["curves"]["vector"][0]["nll"]["mean"] = 3.91
    assert [coefficient for coefficient, _ in strained(summary)] == [-2.0]
    assert "The text is strained at −2 (1.50 nats" in Page(page_of("demo", summary)).text


def test_the_reason_for_the_layer_is_the_true_one() -> None:
    choice = make_summary()["layer_choice"]
    assert layer_reason(choice).startswith(
        "Layer 18 was taken: among the 3 of 4 layers tried whose text stays coherent"
    )
    assert "though" in layer_reason({**choice, "chosen": 15})
    assert "least surprise" in layer_reason({**choice, "margin": 0.1, "chosen": 12})
    assert "least surprise" not in layer_reason({**choice, "margin": 0.1, "chosen": 15})


def test_numbers_are_written_as_they_are_read() -> None:
    assert number(-0.04) == "0.0"
    assert number(-1.25, 1, sign=True) == "−1.2"
    assert number(None) == number(math.nan) == number(math.inf) == "–"
    assert [signed(c) for c in (-2.0, 0.0, 0.5, -0.0)] == ["−2", "0", "+0.5", "0"]
    assert interval(estimate(1.0, 0.5)) == "1.0 (95% interval 0.5 to 1.5)"
    assert bounds(estimate(1.0, 0.0, 1)) == "1.0 (only 1 question)"
    assert bounds(estimate(1.0, 0.5, 4)) == "1.0 (0.5 to 1.5; only 4 questions)"
    assert [scientific(v) for v in (0.0, 1.2e-7, 0.01, None)] == ["0", "1.2 × 10⁻⁷", "0.01", "–"]
    assert list(flat({"a": {"b": [1, 2.0], "c": None}, "d": True})) == [
        ("a › b", "1, 2"),
        ("a › c", "none"),
        ("d", "yes"),
    ]


def test_importing_the_reports_loads_nothing_heavy() -> None:
    program = "import sys, persona_lens.reports; print({'matplotlib', 'jinja2', 'torch', 'numpy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
