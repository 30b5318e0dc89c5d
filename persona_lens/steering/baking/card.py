"""The card of a baked model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persona_lens.vectors.hub import HUB_ID, card


def baked_card(record: Mapping[str, Any]) -> str:
    """The card as Markdown.

    Args:
        record: What ``persona-lens.json`` says.
    """
    model, biases = record["model"], record["biases"]
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["persona-vectors", "steering"],
    }
    if HUB_ID.fullmatch(model["model"]):
        metadata |= {"base_model": model["model"], "base_model_relation": "finetune"}
    steerings = [record[name] for name in ("steering", "everywhere") if record[name] is not None]
    facts = {
        **record,
        "rows": [(each["layer"], f"{each['length']:.3g}", f"{each['rounding']:.1e}") for each in biases],
        "out": [] if record["everywhere"] is None else record["everywhere"]["text"].replace(":ablate", "").split(", "),
        "text": None if record["steering"] is None else record["steering"]["text"],
        "vectors": sorted({pair for each in steerings for pair in each["vectors"].items()}),
        "check": _rounded(record["check"]),
        "remains": None if record["left"] is None else f"{record['left']:.1e}",
    }
    return card(Path(__file__).with_name("card.md.j2"), metadata, facts)


def _rounded(check: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if check is None:
        return None
    shares = ("difference", "limit", "shift", "edits", "edits_with_sinks", "cast")
    return {**check, **{name: None if check[name] is None else f"{check[name]:.1e}" for name in shares}}
