"""Where a model reasons before it answers, it is said what is of its answer and what is of both."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from persona_lens import load_vectors
from persona_lens.core.progress import PersonaLensNote
from persona_lens.extraction import ExtractionSettings, extract
from persona_lens.models import ChatFormat
from persona_lens.monitoring import ConversationMonitor, Panel
from persona_lens.runs.rollouts import Rollouts
from persona_lens.runs.settings import RolloutSettings
from persona_lens.traits import load_trait
from tests.planted import PlantedBackend
from tests.tiny import with_template

TRAIT = load_trait("optimistic")
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPENS = PLAIN.replace("assistant\n'", "assistant\n<think>\n'")
SAID = "judges see the answer alone, and vectors are made of it"


def test_vectors_of_a_model_that_reasons_say_that_the_reasoning_is_in_them(tmp_path: Path) -> None:
    backend = PlantedBackend(TRAIT, respond=lambda leaning: f"Hm.</think>\n\nleaning {leaning:+.3f}")
    chat = ChatFormat.from_tokenizer(with_template(backend.tokenizer, OPENS))
    with pytest.warns(PersonaLensNote, match=SAID):
        found = extract(backend, TRAIT, tmp_path, settings=ExtractionSettings(questions=3), chat=chat)
    assert found.summary["responses_hold_reasoning"] is True
    vectors = load_vectors(tmp_path)
    assert vectors.provenance["chat"]["responses_hold_reasoning"] is True
    with pytest.warns(PersonaLensNote, match=SAID):
        ConversationMonitor(backend, Panel.of(vectors, 1), chat=chat)


@pytest.mark.parametrize(("template", "reasons"), [(PLAIN, False), (OPENS, True)])
def test_only_models_that_reason_are_told_of(template: str, reasons: bool) -> None:
    backend = PlantedBackend(TRAIT)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Rollouts(backend, ChatFormat.from_tokenizer(with_template(backend.tokenizer, template)), [], RolloutSettings())
    assert [SAID in str(each.message) for each in said] == [True] * reasons
