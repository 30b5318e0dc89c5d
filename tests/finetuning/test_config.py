"""Configurations: the paper's defaults, every field documented, nothing unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from persona_lens.finetuning import (
    FinetuneConfig,
    FinetuningError,
    LoraSettings,
    WatchSettings,
    documented,
    make_config,
)
from persona_lens.finetuning.config import read_config


def test_the_defaults_are_the_papers() -> None:
    config = FinetuneConfig()
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.rank_stabilised) == (32, 64, 0, True)
    assert len(config.lora.targets) == 7
    assert (config.learning_rate, config.epochs, config.batch_size, config.accumulation) == (1e-5, 1, 2, 8)
    assert (config.warmup_steps, config.weight_decay, config.lr_schedule, config.max_length) == (
        5,
        0.01,
        "linear",
        2048,
    )
    assert config.method == "plain"


@pytest.mark.parametrize("model", [FinetuneConfig, LoraSettings, WatchSettings])
def test_every_field_is_documented(model: Any) -> None:
    for name, field in model.model_fields.items():
        assert field.description, name


def test_the_documented_yaml_is_the_configuration(tmp_path: Path) -> None:
    config = make_config({"method": "caft", "edits": "evil@3:ablate", "lora": {"rank": 8}, "report_to": ["wandb"]})
    file = tmp_path / "finetune.yaml"
    file.write_text(documented(config), encoding="utf-8")
    assert make_config(read_config(file)) == config
    lines = documented().splitlines()
    fields = [line for line in lines if not line.lstrip().startswith("#")]
    assert len([line for line in lines if line.lstrip().startswith("#")]) >= len(fields)
    assert yaml.safe_load(documented())["learning_rate"] == 1e-5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rat": 1}, "there is no field learning_rat; there are method, edits"),
        ({"lora": {"r": 3}}, "there is no field lora.r; there are rank, alpha"),
        ({"watch": {"evry": 3}}, "there is no field watch.evry; there are every, layers"),
        ({"learning_rate": -1}, "learning_rate: Input should be greater than 0, got -1"),
        ({"method": "magic"}, "method: Input should be 'plain'"),
        ({"method": "preventative"}, "method preventative needs edits, such as"),
        ({"edits": "evil@3:+1"}, "method plain takes no edits"),
        ({"penalty": 1}, "penalty is for method regularised"),
        ({"prompt": "Be evil."}, "prompt is for method prompted"),
        ({"weights": "full", "lora": {"rank": 3}}, "lora is set, and weights full trains no adapter"),
        (
            {"weights": "full", "method": "regularised", "edits": "evil@3"},
            "compares with the model without its adapter",
        ),
        ({"weights": "full", "dtype": "bfloat16"}, "lose small updates"),
        ({"watch": {"stop_above": 1.0}}, "stop_above and layers need every"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FinetuningError, match=message):
        make_config(fields)


def test_everything_wrong_is_named_at_once() -> None:
    with pytest.raises(FinetuningError) as caught:
        make_config({"epochs": 0, "colour": "red"}, "f.yaml")
    assert str(caught.value).count("f.yaml: ") == 2


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n", "must hold fields"), ("a: [", "is not YAML"), (None, "cannot be read")]
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "c.yaml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(FinetuningError, match=message):
        read_config(file)
