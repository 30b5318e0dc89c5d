"""The page of a crossing and its commands: what they say is what was found, and nothing in them can do harm."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from persona_lens.backend import wrap_model
from persona_lens.cli.options import ModelOptions
from persona_lens.cli.options.judges import JudgeOptions
from persona_lens.judging import Calibration, LLMJudge, LocalJudge
from persona_lens.reports.effects import headline
from persona_lens.reports.kinds import page_of
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors, Tuned
from tests.reports.test_report import HOSTILE, Page
from tests.shell import Shell
from tests.tiny import D_MODEL, N_LAYERS, saved_model, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("drawing")
TRAITS = ("optimistic", "impolite", "evil")


def estimate(mean: float, half: float = 2.0, n: int = 9) -> dict[str, Any]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def change(mean: float, clear: int = 0, *, null: bool = True) -> dict[str, Any]:
    random, difference = (estimate(0.25), estimate(mean - 0.25)) if null else (None, None)
    return {"vector": estimate(mean), "random": random, "difference": difference, "clear": clear}


def make_summary(names: tuple[str, ...] = TRAITS, *, null: bool = True) -> dict[str, Any]:
    """Each steering moves its own trait by 40 points and the next one by -10; the others not at all."""
    cells = []
    for i, steering in enumerate(names):
        for j, trait in enumerate(names):
            points, clear = {0: (40.0, 1), 1: (-10.0, -1)}.get((j - i) % len(names), (0.5, 0))
            cells.append(
                {
                    "steering": steering,
                    "trait": trait,
                    "own": i == j,
                    "score": change(points, clear if null else 0, null=null),
                    "text_projection": change(points / 50, clear if null else 0, null=null),
                    "steered_projection": change(points / 10, clear if null else 0, null=null),
                    "cosine": 1.0 if i == j else -0.25,
                }
            )
    matrix = [[1.0 if i == j else 0.3 for j in range(len(names))] for i in range(len(names))]
    responses = [{"steering": None, "text": "As it is.", "scores": dict.fromkeys(names, 50.0)}]
    responses += [{"steering": name, "text": f"So {name}.", "scores": dict.fromkeys(names, 60.0)} for name in names]
    return {
        "model": {"model": "smollm2-135m"},
        "settings": {"questions": 3, "samples": 1},
        "versions": {"persona-lens": "0.1.0"},
        "reduction": "response_mean",
        "questions": [{"text": f"Question {i}?", "trait": names[i % len(names)]} for i in range(9)],
        "traits": [
            {"name": n, "description": f"Is {n}.", "layer": 18 + i, "length": 12.5} for i, n in enumerate(names)
        ],
        "judges": {name: {"judge": "likelihood"} for name in names},
        "steerings": [
            {"name": name, "text": f"{name}@18:+2", "layers": [18], "nll": change(0.3), "coherence": None}
            for name in names
        ],
        "cells": cells,
        "cosines": {
            "traits": list(names),
            "reduction": "response_mean",
            "d_model": 576,
            "null_std": 576**-0.5,
            "cosines": [matrix] * 30,
        },
        "samples": [{"question": "Question 0?", "trait": names[0], "responses": responses}],
    }


@cache
def page() -> str:
    return page_of("effects", make_summary(), "9.9")


def test_the_headline_says_no_more_than_the_cells() -> None:
    found = headline(make_summary())
    assert found.verdict == "clear"
    assert found.title == "3 of 3 steerings clearly move their own traits; 3 of 6 other cells move clearly"
    assert "steering optimistic changes impolite by −10.0 (−12.0 to −8.0), random directions by +0.2" in " ".join(
        found.sentences
    )
    assert headline(make_summary(null=False)).verdict == "no null"
    weak = make_summary()
    weak["cells"][0]["score"]["clear"] = 0
    assert headline(weak).verdict == "unclear"
    assert headline(weak).title.startswith("2 of 3 steerings clearly move")
    empty = make_summary()
    for cell in empty["cells"]:
        cell["score"] = None
    assert headline(empty).verdict == "no null"
    Page(page_of("effects", empty))


def test_every_cell_is_on_the_page_with_its_interval_and_its_null() -> None:
    text = Page(page()).text
    assert text.count("+40.0 +38.0 to +42.0 random +0.2") == 3
    assert text.count("−10.0 −12.0 to −8.0 random +0.2") == 3
    clear = [attrs for attrs in Page(page()).all("span") if attrs.get("class") == "mean clear"]
    assert len(clear) == 3 * 6  # in each of three tables those on the diagonal and beside it
    assert text.count("+0.80") >= 3  # the text, in lengths
    assert text.count("+4.00") >= 3  # the steered model, in lengths
    assert "layer 19, length 12.5" in text
    assert "95% of random directions are within 0.083 of 0" in text
    assert "optimistic and impolite from 0.30 to 0.30" in page()
    # A cell's colour is its share of the largest, whatever its sign.
    styles = [attrs["style"] or "" for attrs in Page(page()).all("td") if "style" in attrs]
    assert styles[:2] == ["--tint:var(--vector);--share:45%", "--tint:var(--third);--share:11%"]
    assert [attrs.get("class") for attrs in Page(page()).all("td") if "style" in attrs][:3] == ["own", None, None]


def test_the_page_is_complete_in_itself_and_repeats() -> None:
    found = Page(page())
    assert not [tag for tag, _ in found.tags if tag in ("script", "img", "iframe", "object")]
    links = [value for _, attrs in found.tags for name, value in attrs.items() if name in ("href", "src") and value]
    assert all(link.startswith(("#", "data:,", "data:image/svg+xml;base64,")) for link in links)
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= {str(name) for name in ids}
    assert page() == page_of("effects", make_summary(), "9.9")


def test_names_and_texts_of_others_do_no_harm() -> None:
    names = tuple(HOSTILE[:6])
    html = page_of("effects", make_summary((*names, "nul\x00\x1b[31m \N{RIGHT-TO-LEFT OVERRIDE}", "lone \ud800")))
    html.encode()
    found = Page(html)
    assert {tag for tag, _ in found.tags} <= {tag for tag, _ in Page(page()).tags}
    assert len(found.all("style")) == 1
    assert not [name for _, attrs in found.tags for name in attrs if name.startswith("on")]
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\ud800-\udfff]", html)


def test_one_trait_without_anything_to_compare_is_a_page_too() -> None:
    html = page_of("effects", make_summary(("evil",), null=False))
    text = Page(html).text
    assert "no random directions were run" in text
    assert "Figure 1" not in text
    assert "nan" not in re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL).lower()


# The command line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Vectors of two traits for that model, one of them tuned."""
    from persona_lens.backend import open_backend

    info = open_backend("transformers", str(model), dtype="float32", device="cpu").info
    folder = tmp_path_factory.mktemp("vectors")
    found = {}
    for name in TRAITS[:2]:
        trait = load_trait(name)
        rows = torch.randn(N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(len(name)))
        provenance: Mapping[str, Any] = {
            "kind": "extraction",
            "trait": {"content_hash": trait.content_hash(), **trait.model_dump(mode="json")},
            "judge": {"judge": "likelihood", "calibration": Calibration(4.0, 0.5).to_json()},
            "counts": {"positive": {"kept": 3, "no_score": 1}, "negative": {"kept": 4, "no_score": 0}},
        }
        vectors = PersonaVectors(name, info, {"response_mean": rows}, provenance)
        if name == "impolite":
            vectors = vectors.with_tuned(Tuned(2, 1.5), {})
        found[name] = str(vectors.save(folder / f"{name}.safetensors"))
    return found


SMALL = ("--dtype", "float32", "--device", "cpu", "--max-new-tokens", "5", "--questions", "1")


SHELL = Shell()
ok, refused = SHELL.ok, SHELL.refused


def test_effects_from_the_command_line_to_the_page(model: Path, files: dict[str, str], tmp_path: Path) -> None:
    command = ("steer", "effects", str(model), *files.values(), "--layer", "1", "--coefficient", "2", *SMALL)
    out = tmp_path / "run"
    found = json.loads(ok(*command, "--random-directions", "1", "--out", str(out), "--json"))
    assert found == json.loads((out / "summary.json").read_text())
    assert [s["text"] for s in found["steerings"]] == ["optimistic@1:+2", "impolite@1:+2"]
    assert [t["layer"] for t in found["traits"]] == [1, 1]
    assert len(found["cells"]) == 4
    html = (out / "report.html").read_text(encoding="utf-8")
    assert Page(html).text.count("optimistic @1:+2") == 3
    shown = ok(*command, "--random-directions", "1", "--out", str(out))
    mean = found["cells"][1]["score"]["vector"]["mean"]
    assert f"{mean:+.1f}" in shown
    assert "random" in shown
    assert "surprise" in shown


def test_edits_of_ones_own_and_the_tuned_choice(model: Path, files: dict[str, str]) -> None:
    bare = (*SMALL, "--random-directions", "0", "--json")
    tuned = json.loads(ok("steer", "effects", str(model), files["impolite"], *bare))
    assert [s["text"] for s in tuned["steerings"]] == ["impolite@2:+1.5"]
    assert [t["layer"] for t in tuned["traits"]] == [2]
    edits = ("--edits", "impolite@1:ablate", "--edits", "optimistic@all:increments(+1)", "--read-layer", "0")
    own = json.loads(ok("steer", "effects", str(model), *files.values(), *edits, *bare))
    assert [s["name"] for s in own["steerings"]] == ["impolite@1:ablate", "optimistic@all:increments(+1)"]
    assert [t["layer"] for t in own["traits"]] == [0, 0]
    assert [(c["own"], c["cosine"] is None) for c in own["cells"]] == [
        (False, False),
        (True, False),
        (True, True),
        (False, True),
    ]


def test_a_dry_run_says_what_it_would_ask(model: Path, files: dict[str, str]) -> None:
    command = ("steer", "effects", str(model), *files.values(), "--layer", "1", "--coefficient", "2", *SMALL)
    work = json.loads(ok(*command, "--dry-run", "--json"))["work"]
    assert [each["label"] for each in work] == ["rollouts", "reading", "judging optimistic", "judging impolite"]


def test_what_cannot_be_done_is_refused_in_a_sentence(model: Path, files: dict[str, str], tmp_path: Path) -> None:
    both = ("steer", "effects", str(model), *files.values())
    assert "are both of 'impolite'" in refused("steer", "effects", str(model), *[files["impolite"]] * 2)
    assert "--layer 1 needs a --coefficient" in refused(*both, "--layer", "1")
    assert "no layer was tuned for the vectors of 'optimistic'" in refused(*both)
    assert "leave out --layer" in refused(*both, "--edits", "impolite@1:+1", "--layer", "1")
    assert "given twice" in refused(*both, *["--edits", "impolite@1:+1"] * 2)
    assert "^" in refused(*both, "--edits", "impolite@:+1")
    assert "layer 7 does not exist" in refused(*both, "--layer", "7", "--coefficient", "1")
    assert "does not exist" in refused("steer", "effects", str(model), str(tmp_path / "none.safetensors"))
    command = (*both, "--layer", "1", "--coefficient", "1", *SMALL)
    assert "--judge takes" in refused(*command, "--judge", "nobody")


def test_judges_of_several_traits_share_a_server_and_a_model(model: Path) -> None:
    traits = {name: load_trait(name) for name in TRAITS}
    backend = wrap_model(tiny_model(seed=0), tiny_tokenizer())
    from persona_lens.models.chat import chat_format

    chat = chat_format(backend)
    server = JudgeOptions(judge_url="http://127.0.0.1:9/v1", judge_key="HOME", prices="1,1", max_spend=1.0)
    asked = server.open("openai:m", traits, ModelOptions(), (backend, chat))
    assert asked is not None
    llm = [judge for judge in asked.values() if isinstance(judge, LLMJudge)]
    assert [judge.trait.name for judge in llm] == list(TRAITS)
    assert len({id(judge.server) for judge in llm}) == 1  # one spending limit for all
    local = JudgeOptions(judge_prefill="Score: ").open("local", traits, ModelOptions(), (backend, chat))
    assert local is not None
    assert all(isinstance(judge, LocalJudge) and judge.prefill == "Score: " for judge in local.values())
    assert [judge.describe()["trait"] for judge in local.values()] == [t.content_hash() for t in traits.values()]
    assert JudgeOptions().open("likelihood", traits, ModelOptions(), (backend, chat)) is None


def test_vectors_show(files: dict[str, str]) -> None:
    said = ok("vectors", "show", files["impolite"])
    assert said.startswith("impolite\n")
    assert "layer 2, coefficient 1.5, response_mean" in said
    assert "likelihood, with its calibration" in said
    assert "negative 4 of 4; positive 3 of 4" in said
    found = json.loads(ok("vectors", "show", files["impolite"], "--json"))
    assert found["tuned"]["layer"] == 2
    assert f"{found['norms']['response_mean'][2]:.2f}" in said
    assert found["calibrated"] is True
    assert json.loads(ok("vectors", "show", files["optimistic"], "--json"))["tuned"] is None


@pytest.mark.parametrize("text", HOSTILE[:6] + HOSTILE[7:9])
def test_vectors_that_say_odd_things_of_themselves_are_shown(files: dict[str, str], tmp_path: Path, text: str) -> None:
    from persona_lens.vectors import load_vectors

    plain = load_vectors(files["impolite"])
    odd = {"judge": text, "counts": [text], "settings": {text: [text]}, "versions": 3}
    path = PersonaVectors(f"[red]{text}", plain.model, plain.directions, odd).save(tmp_path / "odd.safetensors")
    said = ok("vectors", "show", str(path))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", said)
    compared = ok("vectors", "cosines", str(path), files["impolite"], "--layer", "1")
    assert "+1.000" in compared
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", compared)
    spoilt = replace(plain, provenance={"tuned": {"layer": text}}).save(tmp_path / "spoilt.safetensors")
    assert "is damaged: layer: Input should be a valid integer" in refused("vectors", "show", str(spoilt))


def test_vectors_cosines(files: dict[str, str], tmp_path: Path) -> None:
    both = tuple(files.values())
    found = json.loads(ok("vectors", "cosines", *both, "--json"))
    assert found["layers"] == list(range(N_LAYERS))
    assert found["traits"] == ["optimistic", "impolite"]
    one = json.loads(ok("vectors", "cosines", *both, "--layer", "2", "--json"))
    assert one["cosines"] == found["cosines"][2:3]
    value = one["cosines"][0][0][1]
    matrix = ok("vectors", "cosines", *both, "--layer", "2")
    assert matrix.count(f"{value:+.3f}") == 2
    assert f"within {2 / D_MODEL**0.5:.3f} of 0" in matrix
    pairs = ok("vectors", "cosines", *both)
    extreme = max(range(N_LAYERS), key=lambda layer: found["cosines"][layer][0][1])
    assert f"{found['cosines'][extreme][0][1]:+.3f} at {extreme}" in pairs
    # Two extractions of one trait are told apart by their files.
    again = tmp_path / "again.safetensors"
    again.write_bytes(Path(files["impolite"]).read_bytes())
    named = json.loads(ok("vectors", "cosines", files["impolite"], str(again), "--json"))
    assert named["traits"] == [files["impolite"], str(again)]
    assert "at least two" in refused("vectors", "cosines", files["impolite"])
    assert "given twice" in refused("vectors", "cosines", files["impolite"], files["impolite"])
    assert "layer 9 does not exist" in refused("vectors", "cosines", *both, "--layer", "9")
    assert "no reduction" in refused("vectors", "cosines", *both, "--reduction", "prompt_last")
