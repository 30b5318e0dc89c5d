"""Publishing and getting vectors: in a folder, and on a hub of our own through the official client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from persona_lens.vectors import PersonaVectors, Tuned, VectorsError
from persona_lens.vectors.formats import FormatError
from persona_lens.vectors.hub import model_card, pull_vectors, push_vectors
from tests.vectors.formats.files import INFO, vectors
from tests.vectors.formats.loopback_hub import LoopbackHub, serving

ESTIMATE = {"mean": 19.06, "low": 12.76, "high": 25.31, "n": 12}


def described(**more: Any) -> PersonaVectors:
    given = vectors(
        trait={"description": "Complains about everything."},
        counts={"negative": {"kept": 7, "failed_threshold": 3}, "positive": {"kept": 8, "failed_threshold": 2}},
        settings={"samples": 1, "rollouts": {"temperature": 0.6}},
        judge={"judge": "likelihood"},
        versions={"persona-lens": "0.1.0"},
        **more,
    )
    confirmed = {"change": ESTIMATE, "random": {**ESTIMATE, "mean": -2.0, "low": -6.0, "high": 1.0}}
    return given.with_tuned(
        Tuned(2, 4.5), {"confirmed": confirmed, "confirm_questions": 12, "warnings": ["near the cliff"]}
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    import huggingface_hub.constants as constants

    made = LoopbackHub()
    with serving(made) as address:
        for name in ("ENDPOINT", "_HF_DEFAULT_ENDPOINT"):
            monkeypatch.setattr(constants, name, address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield made


def test_a_folder_is_a_hub(tmp_path: Path) -> None:
    repo = str(tmp_path / "repo")
    pushed = push_vectors(described(), repo, licence="mit")
    assert (pushed.place, pushed.commit) == (repo, None)
    assert sorted(file.name for file in Path(repo).iterdir()) == ["README.md", "vectors.safetensors"]
    assert pull_vectors(repo).content_hash == described().content_hash
    push_vectors(described(), repo, licence="mit")
    with pytest.raises(FormatError, match=r"vectors\.safetensors exists and holds something else"):
        push_vectors(2.0 * described(), repo, licence="mit")
    assert pull_vectors(repo).content_hash == described().content_hash
    with pytest.raises(FormatError, match=r"a revision .'main'. belongs to the hub"):
        pull_vectors(repo, revision="main")
    with pytest.raises(VectorsError, match="does not exist"):
        pull_vectors(str(tmp_path / "nothing"))


def test_the_hub_takes_them_and_gives_them_back(hub: LoopbackHub) -> None:
    pushed = push_vectors(described(), "me/grumpy", licence="cc-by-4.0", private=True)
    assert pushed.commit == hub.head("me/grumpy")
    assert "private" in str(hub.made[0])
    assert set(hub.files["me/grumpy"]) == {"README.md", "vectors.safetensors"}
    assert hub.files["me/grumpy"]["vectors.safetensors"] == described().to_bytes()
    found = pull_vectors("me/grumpy")
    assert found.content_hash == described().content_hash
    assert pull_vectors("me/grumpy", revision=pushed.commit).content_hash == found.content_hash
    with pytest.raises(FormatError, match="me/grumpy holds other vectors"):
        push_vectors(2.0 * described(), "me/grumpy", licence="mit")
    assert hub.files["me/grumpy"]["vectors.safetensors"] == described().to_bytes()


def test_what_the_hub_refuses_is_said_in_a_sentence(hub: LoopbackHub) -> None:
    with pytest.raises(FormatError, match="there is no me/nothing on the hub, or you may not see it"):
        pull_vectors("me/nothing")
    hub.files["me/other"], hub.commits["me/other"] = {"model.bin": b"x"}, ["0" * 40]
    with pytest.raises(FormatError, match=r"me/other has no vectors\.safetensors"):
        pull_vectors("me/other")
    with pytest.raises(FormatError, match="no such revision"):
        pull_vectors("me/other", revision="v9")
    hub.files["me/other"]["vectors.safetensors"] = b"nonsense that is long enough"
    with pytest.raises(VectorsError, match="not a safetensors file, or is damaged"):
        pull_vectors("me/other")
    hub.refuses = 403
    with pytest.raises(FormatError, match="does not let you write to me/new"):
        push_vectors(described(), "me/new", licence="mit")
    for repo in ("nameonly", "a/b/c", "me/na me"):
        with pytest.raises(FormatError, match="neither a folder nor a hub id"):
            pull_vectors(repo)


def test_a_hub_that_is_not_there_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FormatError, match=r"me/grumpy (is not in this machine's cache|could not be reached)"):
        pull_vectors("me/grumpy")


def test_the_card_says_what_they_are() -> None:
    card = model_card(described(), "me/grumpy", "cc-by-4.0")
    _, metadata, text = card.split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "license": "cc-by-4.0",
        "library_name": "persona-lens",
        "tags": ["persona-vectors", "steering", "interpretability"],
    }
    for words in (
        "# grumpy: persona vectors of tiny",
        "> Complains about everything.",
        "persona-lens vectors pull me/grumpy --out grumpy.safetensors",
        "Tuned: layer 2, coefficient 4.5",
        "On 12 held-out questions this moved the judge's mean score (0 to 100) by +19.1 (+12.8 to +25.3); random",
        "moved it by -2.0 (-6.0 to +1.0)",
        "- Warning: near the cliff",
        "negative 7 of 10; positive 8 of 10",
        f"| 3 | {vectors().norms('prompt_last')[3]:.2f} |",
        "- settings: samples 1, rollouts temperature 0.6",
        "## Intended use",
        "## Misuse, and limits",
        "cc-by-4.0. The model itself has a licence of its own",
        described().content_hash.removeprefix("sha256:"),
    ):
        assert words in text, words


def test_the_card_of_vectors_that_know_little_says_so() -> None:
    info = INFO.__class__(**{**INFO.__dict__, "model": "owner/name", "weights": None})
    little = PersonaVectors("t", info, vectors().directions, {"kind": "imported", "missing_layers": [0]})
    card = model_card(little, "me/t", "mit")
    assert "base_model: owner/name" in card
    for words in ("No layer or strength was tuned", "No vector for layers 0", "weights not known", "does not say how"):
        assert words in card


def test_what_others_wrote_is_no_markdown() -> None:
    nasty = PersonaVectors(
        "x](http://evil) <script>\n# Free", INFO, vectors().directions, {"trait": {"description": "`a`\n\n# b | c\x1b"}}
    )
    card = model_card(nasty, "me/t", "mit")
    assert "<script>" not in card
    assert "](http" not in card
    assert "\n# Free" not in card
    assert "\n# b" not in card
    assert "\x1b" not in card
    with pytest.raises(FormatError, match="a licence is written as on the hub"):
        model_card(described(), "me/t", "mit\ntags: [x]")
