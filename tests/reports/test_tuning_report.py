"""The page of a tuning run: what it says, that it says no more, and that nothing in it can do harm."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from persona_lens.monitoring.markup import STEPS, dark, light
from persona_lens.reports import svg, tuning
from persona_lens.reports.kinds import page_of
from persona_lens.reports.tuning import figures, headline, named_arms
from tests.reports.test_report import (
    HOSTILE,
    Page,
    assert_harmless,
    assert_loads_nothing,
    assert_sound,
    change,
    estimate,
    provenance,
)

LAYERS = (9, 11, 14, 16, 19, 21, 24, 26)
STRENGTHS = (0.1, 0.2, 0.3, 0.45, 0.65, 0.9)
PLAIN, MARGIN = 1.37, 1.0
CHOSEN = (16, 3.1)


def point(layer: int, number: int, n: int = 8, sign: int = 1) -> dict[str, Any]:
    """A place whose effect rises with the strength and falls with the distance from layer 17, till text falls apart."""
    strength, coefficient = STRENGTHS[number] * 1.01, round(sign * (0.4 + 0.9 * number), 2)
    gain = sign * (70 * strength - 60 * strength**2) * math.exp(-(((layer - 17) / 6) ** 2))
    null = -sign * 9 * strength * math.sin(layer)
    nll = PLAIN + 0.4 * strength + 2.2 * strength**3
    effect = {
        "arm": f"optimistic@{layer}:{coefficient:+g}",
        "score": estimate(61.3 + gain, 9.1, n),
        "change": estimate(gain, 8.4, n),
        "random": estimate(null, 5.2, n),
        "difference": estimate(gain - null, 9.7, n),
        "nll": estimate(nll, 0.21, n),
        "coherence": None,
        "clear": int(gain - null > 14),
        "empty": 0.125 * (number == 5),
    }
    return {
        "layer": layer,
        "coefficient": coefficient,
        "strength": strength,
        "coherent": nll <= PLAIN + MARGIN,
        "surely": nll <= PLAIN + MARGIN - 0.2,
        "questions": n,
        "dropped": None,
        "effect": effect,
    }


def make_tuning(sign: int = 1) -> dict[str, Any]:
    of = provenance()
    layer, coefficient = CHOSEN[0], sign * CHOSEN[1]
    surface = [point(each, number, sign=sign) for each in LAYERS for number in range(len(STRENGTHS))]
    curve = [point(layer, number, 12, sign) for number in range(len(STRENGTHS))]
    (chosen,) = (each for each in surface if (each["layer"], each["coefficient"]) == (layer, coefficient))
    (confirmed,) = (each for each in curve if each["coefficient"] == coefficient)
    confirmed["effect"] |= {"change": estimate(sign * 24.6, 6.1, 12), "random": estimate(-1.9, 4.4, 12)}
    confirmed["effect"] |= {"difference": estimate(sign * 26.5, 7.2, 12), "clear": sign}
    plain = {"score": estimate(61.3, 7.7, 8), "nll": estimate(PLAIN, 0.1, 8), "coherence": None}
    return {
        "command": "persona-lens steer tune smollm2-135m runs/optimistic",
        "vectors": "sha256:89ab",
        "judge": {
            "judge": "likelihood",
            "note": "likelihood (a proxy)",
            "trait": "sha256:cf68",
            "calibration": {"slope": 37.47, "intercept": 0.03},
        },
        "model": of["model"],
        "chat": {"digest": "sha256:1", "system_role": True, "thinking": False},
        "versions": of["versions"],
        "trait": "optimistic",
        "description": "Expects that things will turn out well.",
        "trait_hash": "sha256:cf68",
        "towards": "more" if sign > 0 else "less",
        "settings": {
            "layers": list(LAYERS),
            "strengths": list(STRENGTHS),
            "samples": 1,
            "confirm_samples": 2,
            "random_directions": 5,
            "margin": MARGIN,
            "seed": 0,
            "rollouts": {"max_new_tokens": 48, "temperature": 1.0},
        },
        "race": None,
        "cost": {
            "search": {"responses": 784, "generated_tokens": 31234, "judged_tokens": 612345},
            "confirm": {"responses": 312, "generated_tokens": 12345, "judged_tokens": None},
        },
        "strengths": list(STRENGTHS),
        "search_questions": 8,
        "confirm_questions": 12,
        "left_questions": 12,
        "residual_norms": [40.0 + 3 * layer for layer in range(30)],
        "vector_norms": [1.5 + layer for layer in range(30)],
        "measured": "nll",
        "unsteered": {"search": {**plain, "limit": PLAIN + MARGIN}, "confirm": {**plain, "limit": PLAIN + MARGIN}},
        "surface": surface,
        "chosen": {"steering": confirmed["effect"]["arm"], **copy.deepcopy(chosen)},
        "confirmed": copy.deepcopy(confirmed["effect"]),
        "curve": curve,
        "warnings": [
            "near the coherence cliff: at coefficient 4, the next that was tried, text no longer holds together"
        ],
        "samples": [
            {
                "question": f"Will number {i} go well?",
                "responses": [
                    {"direction": "none", "score": 51.5 + i, "text": "It depends on many things."},
                    {"direction": "vector", "score": 88.5 + i, "text": "It will be wonderful!"},
                    {"direction": "random", "score": None, "text": " "},
                ],
            }
            for i in range(6)
        ],
    }


def capability() -> list[dict[str, Any]]:
    return [
        {"coefficient": 0.0, "accuracy": estimate(0.412, 0.031, 200), "score": estimate(61.3, 7.7, 12)},
        {"coefficient": 3.1, "accuracy": estimate(0.377, 0.033, 200), "score": estimate(85.9, 6.2, 12)},
        {"arm": "<b>both</b>", "accuracy": estimate(0.301, 0.03, 200), "score": None},
    ]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(page_of("tune", make_tuning()))


def test_a_reader_is_told_of_surprise_not_of_the_name_of_its_field(page: Page) -> None:
    assert "comes at a surprise of" in page.text
    assert "nll" not in page.text


def text_of(summary: dict[str, Any]) -> str:
    return Page(page_of("tune", summary)).text


@pytest.mark.usefixtures("drawing")
def test_the_same_summary_gives_the_same_bytes() -> None:
    first = page_of("tune", make_tuning())
    assert page_of("tune", json.loads(json.dumps(make_tuning()))) == first


def test_the_structure_is_sound(page: Page) -> None:
    assert_sound(page)
    assert len(page.all("figure")) == 4  # the heat maps are no drawing
    assert len(page.all("svg")) == 6


@pytest.mark.usefixtures("drawing")
def test_nothing_is_loaded_from_anywhere() -> None:
    assert_loads_nothing(page_of("tune", make_tuning()))


CHANGES: list[tuple[str, Any, str]] = [
    ("confirmed/change/mean", 41.71, "raises the trait score by 41.7 points"),
    ("confirmed/change/low", 13.33, "+41.7 (95% interval +13.3 to"),
    ("confirmed/random/mean", -1.23, "change it by −1.2 ("),
    ("confirmed/difference/high", 77.77, "to +77.8), which lies clear of zero"),
    ("unsteered/confirm/score/mean", 33.33, "from 33.3 unsteered"),
    ("unsteered/search/limit", 2.22, "Beyond 2.22"),
    ("confirm_questions", 13, "12 held-out questions of 13"),
    ("search_questions", 7, "7 held-out questions"),
    ("chosen/steering", "optimistic@3:+9", "optimistic@3:+9"),
    ("chosen/strength", 0.777, "a step 0.78 times"),
    ("surface/0/effect/change/mean", 5.55, "+5.5 ("),
    ("surface/1/effect/random/high", 33.31, "to +33.3)"),
    ("surface/2/effect/nll/mean", 9.87, "9.87 ("),
    ("surface/2/effect/score/mean", 44.41, "44.4 ("),
    ("surface/3/effect/empty", 0.375, "38%"),
    ("surface/4/strength", 0.6789, "0.679"),
    ("curve/1/effect/change/mean", 22.21, "+22.2 ("),
    ("curve/2/effect/difference/low", -7.77, "(−7.8 to"),
    ("residual_norms/5", 56.789, "56.789"),
    ("vector_norms/6", 7.6543, "7.654"),
    ("samples/0/responses/1/score", 12.34, "score 12.3"),
    ("samples/1/responses/0/text", "Something else.", "Something else."),
    ("judge/calibration/slope", 12.3456, "12.346"),
    ("settings/rollouts/max_new_tokens", 49, "rollouts › max_new_tokens 49"),
    ("settings/random_directions", 7, "7 random rotations"),
    ("cost/search/responses", 785, "785 responses of 31,234 tokens in the search, and 612,345 tokens read to judge"),
    ("cost/confirm/generated_tokens", 12346, "12,346 tokens in the confirmation."),
    ("warnings", ["beware of the dog"], "Beware of the dog."),
    ("command", "persona-lens steer tune elsewhere", "steer tune elsewhere"),
    ("vectors", "sha256:4567", "sha256:4567"),
    ("versions/torch", "9.9.9", "9.9.9"),
    ("model/weights", "sha256:0123", "sha256:0123"),
]


def test_what_is_shown_comes_from_the_summary() -> None:
    page, summary = Page(page_of("tune", make_tuning())), make_tuning()
    for path, value, _ in CHANGES:
        change(summary, path, value)
    other = text_of(summary)
    assert [(path, shown) for path, _, shown in CHANGES if other.count(shown) <= page.text.count(shown)] == []


DRAWN = {
    "curve/1/effect/change/low": {"curve"},
    "curve/1/effect/random/mean": {"curve"},
    "curve/1/effect/nll/mean": {"curve"},
    "unsteered/confirm/limit": {"curve"},
    "unsteered/search/limit": {"tradeoff"},
    "surface/7/effect/nll/mean": {"tradeoff"},
    "surface/7/coherent": {"tradeoff"},
    "vector_norms/5": {"norms"},
    "residual_norms/29": {"norms"},
    "capability/1/accuracy/low": {"capability"},
}


@pytest.mark.usefixtures("drawing_wide")
def test_what_is_drawn_comes_from_the_summary() -> None:
    def drawn(summary: dict[str, Any]) -> dict[str, str]:
        return {name: each.wide + each.narrow for name, each in svg.Drawn(figures(summary)).items()}

    full = {**make_tuning(), "capability": capability()}
    before = drawn(full)
    for path, moves in DRAWN.items():
        summary = copy.deepcopy(full)
        change(summary, path, False if path.endswith("coherent") else 0.137)
        after = drawn(summary)
        assert {name for name in before if before[name] != after[name]} == moves, path


# The heat maps


def cells(page: Page) -> list[dict[str, str | None]]:
    return [a for a in page.all("td") if "cell" in str(a.get("class")).split()]


def test_every_place_is_a_cell_of_both_maps(page: Page) -> None:
    summary = make_tuning()
    assert len(cells(page)) == 2 * len(summary["surface"])
    for place, cell in zip(summary["surface"], cells(page), strict=False):
        assert str(cell["title"]).startswith(
            f"layer {place['layer']}, coefficient +{place['coefficient']:g}, strength "
        )
        assert ("fallen" in str(cell["class"]).split()) == (not place["coherent"])
    chosen = [str(cell["title"]) for cell in cells(page) if "chosen" in str(cell["class"]).split()]
    assert [title.startswith("layer 16, coefficient +3.1, strength") for title in chosen] == [True, True]
    assert page.text.count(", text falls apart") == sum(not place["coherent"] for place in summary["surface"])


def test_both_maps_have_one_scale() -> None:
    summary = make_tuning()
    summary["surface"][3]["effect"]["random"] = estimate(-50.0, 3.0, 8)
    summary["surface"][4]["effect"]["change"] = estimate(25.0, 3.0, 8)
    found = Page(page_of("tune", summary))
    assert "−50 +50 points" in found.text
    own, null = cells(found)[4], cells(found)[len(summary["surface"]) + 3]
    assert (own["class"], own["style"]) == ("cell more", "--shade:50%")
    assert (null["class"], null["style"]) == ("cell less", "--shade:100%")


def test_a_place_stands_in_the_column_of_its_push_whatever_was_rounded_or_left_out() -> None:
    summary = make_tuning()
    summary["strengths"] = [0.9, 0.1, 0.2, 0.3, 0.45, 0.65]
    del summary["surface"][2]  # two strengths gave the same coefficient
    html = page_of("tune", summary)
    assert [float(strength) for strength in re.findall(r'<th scope="col">(0\.\d+)</th>', html)[:6]] == list(STRENGTHS)
    first = re.findall(r"<td.*?</td>", html[html.index('class="heat"') :], re.DOTALL)[:6]
    strengths = [re.findall(r"strength ([\d.]+):", cell) for cell in first]
    assert strengths == [["0.10"], ["0.20"], [], ["0.45"], ["0.66"], ["0.91"]]


def test_the_colours_are_those_of_the_heat_map_of_tokens() -> None:
    """Which are tested to be legible."""
    css = (Path(tuning.__file__).parent / "report.css").read_text(encoding="utf-8")
    for shade in (light, dark):
        assert f"--low: {shade(-STEPS)}; --high: {shade(STEPS)};" in css
        assert f"--paper: {shade(0)};" in css


def raced() -> dict[str, Any]:
    """Of a race: not every place was tried, and not every place that was tried was asked everything."""
    summary = make_tuning()
    del summary["surface"][::2]
    for number, place in enumerate(summary["surface"]):
        place["effect"].update(random=None, difference=None)
        place["dropped"] = "broken" if not place["coherent"] else ("weaker", None, "undecided")[number // 3 % 3]
        place["questions"] = 8 if place["dropped"] is None else 2
    summary["settings"] |= {"round_questions": 2}
    summary["race"] = {
        "layers": [16, 14, 19, 11, 21, 9, 24, 26, 5],
        "untried": [5],
        "rounds": 9,
        "budget": 176,
        "steered": 118,
    }
    return summary


def test_the_page_of_a_race_says_what_was_asked_how_much_and_why_no_more() -> None:
    summary = raced()
    page = Page(page_of("tune", summary))
    fates = [place["dropped"] for place in summary["surface"]]
    assert len(cells(page)) == len(summary["surface"]) == 24
    for place, cell in zip(summary["surface"], cells(page), strict=True):
        told = "asked 2 questions and no more, since" in str(cell["title"])
        assert told == (place["dropped"] is not None)
    assert "since it could hardly have been the best" in str([cell["title"] for cell in cells(page)])
    assert "118 steered responses went where the choice was still open" in page.text
    assert f"Of 24 places, {fates.count(None)} were asked all the questions" in page.text
    assert f"{fates.count('broken')} were dropped since their text falls apart" in page.text
    assert f"{fates.count('weaker')} could hardly have been the best" in page.text
    assert f"at {fates.count('undecided')} the budget ended" in page.text
    assert page.text.count("of 2") >= len(fates) - fates.count(None)
    assert "on up to 8 questions" in page.text
    assert "A race: layers from the middle out;" in page.text
    assert "It took 9 rounds, and did not come to 1 layer." in page.text
    assert "Random directions stand beside the choice where it is confirmed, and not here." in page.text
    assert "No random directions were run" not in page.text
    assert "between a gentler and a stronger one" in page.text
    decided = raced()
    for place in decided["surface"]:
        place["dropped"] = None
    assert "the budget ended" not in text_of(decided)


# Verdicts


def verdict_of(sign: int = 1, **changes: Any) -> tuple[str, str]:
    summary = make_tuning(sign)
    summary["confirmed"].update(changes)
    found = headline(summary)
    return found.verdict, " ".join((found.title, *found.sentences))


def test_a_clear_effect_is_called_one_in_either_direction() -> None:
    shown, words = verdict_of()
    assert shown == "clear"
    assert words.startswith("A clear effect: the chosen steering raises the trait score by 24.6 points")
    assert "by +24.6 (95% interval +18.5 to +30.7), from 61.3 unsteered." in words
    shown, words = verdict_of(-1)
    assert shown == "clear"
    assert words.startswith("A clear effect: the chosen steering lowers the trait score by 24.6 points")


@pytest.mark.parametrize(
    ("changes", "shown", "said"),
    [
        ({"difference": estimate(2.0, 6.1)}, "unclear", "not clearly more than what random directions do"),
        ({"random": estimate(20.0, 9.0)}, "clear", "which lies clear of zero"),
        ({"change": estimate(2.0, 6.1)}, "unclear", "not clearly more than what chance explains"),
        ({"change": estimate(2.0, 6.1)}, "unclear", "though the vector's own effect does not"),
        ({"difference": estimate(2.0, 6.1)}, "unclear", "not shown that this direction is special"),
        ({"change": estimate(-1.0, 2.0)}, "unclear", "not clearly more than what chance explains"),
        (
            {"change": estimate(24.6, 0, 1), "difference": estimate(26.5, 0, 1)},
            "unclear",
            "one question, so no interval",
        ),
        ({"change": estimate(-9.0, 2.0), "difference": estimate(-9.0, 3.0)}, "reversed", "the wrong way round"),
        ({"change": estimate(-9.0, 2.0), "difference": estimate(9.0, 3.0)}, "unclear", "own effect is the wrong way"),
        ({"random": None, "difference": None}, "no null", "No random directions were run"),
        ({"random": None, "difference": None, "change": estimate(-9.0, 1.0)}, "reversed", "wrong way round"),
        ({"change": estimate(24.6, 6.1, 11)}, "clear", "Over 11 held-out questions of 12"),
    ],
)
def test_nothing_is_called_more_than_it_is(changes: dict[str, Any], shown: str, said: str) -> None:
    found, words = verdict_of(**changes)
    assert found == shown
    assert said in words
    assert words.startswith("A clear effect") == (shown == "clear")


def test_text_that_falls_apart_is_no_success() -> None:
    summary = make_tuning()
    for place in summary["curve"]:
        place["coherent"] = False
    assert headline(summary).verdict == "unclear"
    assert "The text falls apart: the chosen steering raises" in text_of(summary)
    for place in [*summary["surface"], summary["chosen"]]:
        place["coherent"] = False
    text = text_of(summary)
    assert "At 48 of 48 places, hatched, the text falls apart" in text
    assert "A clear effect" not in text


@pytest.mark.usefixtures("drawing")
def test_no_confirmed_effect_is_no_result() -> None:
    summary = make_tuning()
    summary["confirmed"] = None
    for place in summary["curve"]:
        place["effect"], place["coherent"] = None, False
    text = text_of(summary)
    assert "No result: no steered response to the questions kept for confirmation has a score" in text
    assert "there is no curve" in text
    assert "A clear effect" not in text


# What is missing


@pytest.mark.usefixtures("drawing")
def test_a_missing_null_is_said_to_be_missing() -> None:
    summary = make_tuning()
    for place in [*summary["surface"], *summary["curve"], {"effect": summary["confirmed"]}]:
        place["effect"].update(random=None, difference=None)
    summary["settings"]["random_directions"] = 0
    found = Page(page_of("tune", summary))
    assert len(cells(found)) == len(summary["surface"])
    assert "No random directions were run" in found.text
    assert "None was run." in found.text
    assert "random directions" not in "".join(str(svg.Drawn(figures(summary))["curve"]))


@pytest.mark.usefixtures("drawing")
def test_places_without_a_score_and_an_empty_summary_of_samples() -> None:
    summary = make_tuning()
    summary["surface"][0].update(effect=None, coherent=False)
    summary["samples"], summary["warnings"], summary["command"] = [], [], None
    summary["vector_norms"][0] = 0.0
    found = Page(page_of("tune", summary))
    assert "no response has a score" in found.text
    assert "holds no sample answers" in found.text
    assert "Mind this" not in found.text
    assert "persona_lens.steering.tune" in found.text
    assert "None" not in found.text.replace("None was run", "")
    assert "nan" not in found.text.lower().split()


@pytest.mark.usefixtures("drawing")
def test_a_judge_of_coherence_is_shown_as_that() -> None:
    summary = make_tuning()
    summary["measured"], summary["judge"] = "coherence", {"judge": "openai", "model": "gpt-9", "samples": 3}
    for place in [*summary["surface"], *summary["curve"]]:
        place["effect"].update(coherence=estimate(77.7, 4.0, 8), nll=None)
    for plain in summary["unsteered"].values():
        plain.update(coherence=estimate(91.2, 3.0, 8), nll=None, limit=50.0)
    text = text_of(summary)
    assert "Below a mean of 50 text counts as fallen apart" in text
    assert "Coherence, 0 to 100" in text
    assert "77.7 (73.7 to 81.7)" in text
    assert "91.2 (88.2 to 94.2)" in text
    assert "gpt-9" in text
    assert "likelihood judge" not in text
    assert "nats" not in text


def test_capability_is_shown_where_it_was_measured(page: Page) -> None:
    assert "Trait against capability" not in page.text
    found = Page(page_of("tune", {**make_tuning(), "capability": capability()}))
    assert len(found.all("figure")) == 5
    assert "Trait against capability" in found.text
    assert "0.377 (0.344 to 0.410)" in found.text
    assert "+3.1: accuracy 0.377" in found.text
    assert "<b>both</b>" in found.text
    assert [each["name"] for each in named_arms({"capability": capability()})] == ["0", "+3.1", "#3"]


@pytest.mark.usefixtures("drawing")
def test_the_smallest_run_still_makes_a_page() -> None:
    summary = make_tuning()
    only = copy.deepcopy(summary["surface"][0])
    for name in ("score", "change", "random", "difference", "nll"):
        only["effect"][name] = estimate(0.0, 0.0, 1)
    summary.update(
        surface=[only], curve=[only], chosen={**only, "steering": "optimistic@9:+0.4"}, confirmed=only["effect"]
    )
    summary.update(residual_norms=[1.0] * 10, vector_norms=[1.0] * 10, confirm_questions=1)
    summary["strengths"] = [0.1]
    text = text_of(summary)
    assert "No clear effect" in text
    assert "one question, so no interval" in text


def test_a_summary_that_lacks_a_part_is_an_error() -> None:
    summary = make_tuning()
    del summary["trait_hash"]
    with pytest.raises(Exception, match="trait_hash"):
        page_of("tune", summary)


# Text of others


def infected(text: str) -> dict[str, Any]:
    summary = make_tuning()
    summary["samples"][0]["question"] = summary["samples"][0]["responses"][1]["text"] = text
    summary["trait"] = summary["description"] = summary["command"] = summary["chosen"]["steering"] = text
    summary["model"]["model"] = summary["versions"]["torch"] = summary["judge"]["note"] = text
    summary["settings"][text] = text
    summary["warnings"] = [f"a {text}"]
    return summary


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_does_nothing(page: Page, text: str) -> None:
    assert_harmless(page_of("tune", infected(text)), text, page)


@pytest.mark.usefixtures("drawing_wide")
def test_no_text_of_others_reaches_a_figure() -> None:
    assert svg.Drawn(figures(infected(" ".join(HOSTILE)))) == svg.Drawn(figures(make_tuning()))
