"""Text of others on the pages of crossings, screenings and studies of finetuning: names and texts that attack."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from persona_lens.data.datasets import open_dataset
from persona_lens.finetuning.outcomes import BASE, PLAIN, RANDOM, Outcome, summarise
from persona_lens.reports.kinds import page_of
from persona_lens.screening import Flagging, screen
from tests.core.test_foreign_text import ACTS, HEBREW, NASTY
from tests.reports.test_crossing_report import make_summary
from tests.screening import made

HOSTILE = f"{NASTY}\"'></td></svg><img src=x onerror=alert(1)>{{{{ 7*7 }}}}]]>--><!--{HEBREW}"
TEXTS = ("text", "prompt", "response", "question", "id", "description")  # keys of what others wrote


def of_crossing(_: Path) -> tuple[dict[str, Any], Collection[str]]:
    return make_summary(("one", "two")), ("one", "two", "smollm2-135m")


def of_finetuning(_: Path) -> tuple[dict[str, Any], Collection[str]]:
    outcomes = [
        Outcome(
            name,
            seed,
            {0: 40.0 + len(name), 1: 50.0},
            {0: 1.0, 1: 2.0},
            {0: 0.5, 1: 0.25},
            {"last": 1.0, "learned": 0.5, "unseen": None},
            {0: 1.0, 1: 0.0},
        )
        for seed in (1, 2)
        for name in (BASE, PLAIN, "preventative", RANDOM)
        if name != BASE or seed == 1
    ]
    head = {
        "trait": "grumpy",
        "model": "a-model",
        "conversations": 2,
        "names": {"plain": None, "preventative": "grumpy@1:+1", "random": "grumpy@1:+1"},
        "settings": {
            "layer": 1,
            "seeds": [1, 2],
            "task": "a-task",
            "asked": {"questions": [0, 1], "samples": 1},
            "treatments": {"preventative": "grumpy@1:+1"},
        },
        "config": {"learning_rate": 1e-5},
        "judge": {"judge": "openai", "model": "a-model"},
    }
    samples = [{"question": "Q?", "responses": [{"name": BASE, "score": 5.0, "text": "Hm."}]}]
    return {**head, **summarise(outcomes), "samples": samples}, ("grumpy", "a-model", "a-task")


def of_screening(folder: Path) -> tuple[dict[str, Any], Collection[str]]:
    data = made.jsonl(folder / "rows.jsonl", made.pairs(30, tone=["rude", "calm"]))
    clean = [open_dataset(made.jsonl(folder / "clean.jsonl", made.pairs(24, 4)))]
    flagging = Flagging(false_positive_rate=0.5, random_directions=2, clean="calm")
    data_of_two_tones = [open_dataset(data, label="tone", by="tone")]
    judges = {"kind": made.LengthJudge()}
    screen(made.backend(), data_of_two_tones, made.panel(), folder=folder / "run", reference=clean, flagging=flagging,
           chat=made.chat(), judges=judges)  # fmt: skip
    names = ("kind", "odd", "rude", "calm", str(data), str(folder / "clean.jsonl"), "LlamaForCausalLM")
    return json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8")), names


def poisoned(value: Any, names: Collection[str], key: str = "") -> Any:
    """A summary whose names, wherever they stand, and texts of others end in what is hostile."""
    if isinstance(value, dict):
        return {_named(name, names): poisoned(each, names, name) for name, each in value.items()}
    if isinstance(value, list):
        return [poisoned(each, names, key) for each in value]
    if not isinstance(value, str):
        return value
    return value + HOSTILE if key in TEXTS else _named(value, names)


def _named(text: str, names: Collection[str]) -> str:
    name, at, layer = text.rpartition("@")
    return next((f"{own}{HOSTILE}{at}{layer}" for own in names if own in (text, name)), text)


class Tags(HTMLParser):
    """The tags of a page with the names of their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {(tag, name) for name, _ in attrs} | {(tag, "")}


@pytest.mark.parametrize(
    ("make", "kind"),
    [(of_crossing, "effects"), (of_finetuning, "finetune study"), (of_screening, "screening")],
)
def test_names_and_texts_of_others_do_nothing_on_a_page(
    make: Callable[[Path], tuple[dict[str, Any], Collection[str]]], kind: str, tmp_path: Path
) -> None:
    summary, names = make(tmp_path)
    plain, page = page_of(kind, summary), page_of(kind, poisoned(summary, names))
    page.encode()
    assert Tags(page).found <= Tags(plain).found
    assert not ACTS.search(page), ascii(ACTS.search(page))
    assert "<script" not in page
    assert "[/x][red]:smile:" in page
    assert "{{ 7*7 }}" in page
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(figures) == len(re.findall(r"<svg.*?</svg>", plain, flags=re.DOTALL)) > 0
    for figure in figures:
        ElementTree.fromstring(figure)
