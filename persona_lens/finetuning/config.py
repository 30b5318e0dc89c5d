"""`FinetuneConfig`: everything that determines a finetuning, from YAML, with the paper's settings as defaults."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from persona_lens.backend import Edit, Operation
from persona_lens.core.documents import DocumentError, read_yaml
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import shown
from persona_lens.steering import Steering
from persona_lens.traits import Arm
from persona_lens.vectors import PersonaVectors


class FinetuningError(PersonaLensError):
    """A finetuning that cannot be run as asked."""


@dataclass(frozen=True)
class Measures:
    """What is done beside plain training.

    Attributes:
        edits: Made in every training forward.
        penalised: Directions, with their layers, along which a penalty holds the model.
        prompts: System prompts that stand before the training data in turn.
        steering: What the edits come from; None without them.
    """

    edits: tuple[Edit, ...] = ()
    penalised: tuple[Edit, ...] = ()
    prompts: tuple[str, ...] = ()
    steering: Steering | None = None


def measures_of(config: FinetuneConfig, vectors: Sequence[PersonaVectors]) -> Measures:
    """What a configuration asks for (method, section 6).

    Args:
        config: Names the method.
        vectors: Those that its edits name; for prompting the first give the trait.

    Raises:
        NotationError, SteeringError: If the edits are not written as steerings are, or name other vectors.
        FinetuningError: If they do something that the method does not, or vectors are missing.
    """
    if config.method is Method.PLAIN:
        return Measures()
    if config.method is Method.PROMPTED:
        if config.prompt is not None:
            return Measures(prompts=(config.prompt,))
        if not vectors:
            raise FinetuningError(
                "prompted needs a system prompt (prompt), or vectors whose trait has some (--vectors)"
            )
        trait = vectors[0].trait_definition
        pairs = range(len(trait.instructions))
        return Measures(prompts=tuple(trait.system_prompt(Arm.POSITIVE, pair) for pair in pairs))
    if not vectors:
        raise FinetuningError(f"the edits {config.edits!r} name vectors, and none are given (--vectors)")
    assert config.edits is not None  # a configuration without them is refused
    steering = Steering.parse(config.edits, vectors)
    edits = steering.edits()
    if config.method is Method.REGULARISED:
        return Measures(penalised=edits, steering=steering)
    made = Operation.ADD if config.method is Method.PREVENTATIVE else Operation.ABLATE
    if others := [edit.operation for edit in edits if edit.operation is not made]:
        does = f"{str(steering)!r} does {others[0]}"
        if made is Operation.ADD:
            raise FinetuningError(f"preventative steering adds vectors, and {does}; use caft")
        raise FinetuningError(f"caft ablates, and {does}; write {steering.terms[0].trait}@LAYER:ablate")
    return Measures(edits=edits, steering=steering)


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_STRICT = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
_Count = Annotated[int, Field(ge=1)]
_Share = Annotated[float, Field(ge=0, lt=1)]
_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Method(StrEnum):
    """How training is kept from teaching a trait."""

    PLAIN = "plain"
    PREVENTATIVE = "preventative"
    CAFT = "caft"
    REGULARISED = "regularised"
    PROMPTED = "prompted"


UNDER_EDITS = (Method.PREVENTATIVE, Method.CAFT, Method.REGULARISED)


class LoraSettings(BaseModel):
    """The adapter."""

    model_config = _STRICT

    rank: _Count = 32
    """Rank of the two matrices that each layer gets."""
    alpha: _Rate = 64
    """Scale: what the matrices add is multiplied by alpha / sqrt(rank), or alpha / rank if not rank-stabilised."""
    rank_stabilised: bool = True
    """Scale by the square root of the rank (rsLoRA)."""
    dropout: _Share = 0.0
    """Share of the inputs that is dropped while training."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = PROJECTIONS
    """Names of the linear layers that are adapted."""


class WatchSettings(BaseModel):
    """Watching where the model goes while it is trained."""

    model_config = _STRICT

    every: _Count | None = None
    """Project the evaluation questions on the traits every so many optimizer steps; null does not watch."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Layers to project at, counted from 0; empty takes those of the edits, or the one that was tuned."""
    stop_above: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Stop as soon as the mean projection on a trait has risen by more than this since before training, in
    residual-stream units; null never stops."""

    @model_validator(mode="after")
    def _stops_only_if_watching(self) -> WatchSettings:
        if self.every is None and (self.stop_above is not None or self.layers):
            raise ValueError("stop_above and layers need every")
        return self


class FinetuneConfig(BaseModel):
    """How a model is finetuned. The defaults are the paper's settings (method, section 6)."""

    model_config = _STRICT

    method: Method = Method.PLAIN
    """plain; preventative: the edits act in every training forward; caft: so do ablations; regularised: a loss term
    holds the projections on the edits' directions; prompted: a system prompt that calls the trait forth in training."""
    edits: str | None = None
    """For preventative, caft and regularised, in the notation of steerings: impolite@18:+2, or
    impolite@all:increments(+2), or for caft impolite@18:ablate. A schedule counts optimizer steps. Regularised takes
    only traits and layers from it."""
    penalty: _Weight | None = None
    """For regularised: weight of the loss term, which is counted in squared norms of the vector; null takes 1."""
    prompt: str | None = None
    """For prompted: the system prompt; null takes the trait's five positive ones in turn."""
    weights: Literal["lora", "full"] = "lora"
    """What is trained: a LoRA adapter, or all weights."""
    lora: LoraSettings = LoraSettings()
    """The adapter; of no use with full weights."""
    learning_rate: _Rate = 1e-5
    """Peak learning rate."""
    lr_schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """How the learning rate goes on after warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 5
    """Optimizer steps until the learning rate has risen to its peak."""
    weight_decay: _Weight = 0.01
    """AdamW's weight decay."""
    max_grad_norm: _Rate = 1.0
    """Gradients are scaled down to this norm."""
    epochs: _Rate = 1.0
    """Times that the data is gone through."""
    max_steps: _Count | None = None
    """Optimizer steps, in place of epochs."""
    batch_size: _Count = 2
    """Conversations in one pass."""
    accumulation: _Count = 8
    """Passes to one optimizer step."""
    max_length: _Count = 2048
    """Tokens of a conversation; what is beyond is cut off."""
    part: Literal["all", "answer"] = "all"
    """What is learned of what the assistant says: all, or answer: the reasoning before it (as this model marks it, or
    ``<think>``) is read and not learned."""
    gradient_checkpointing: bool = False
    """Compute activations twice to hold fewer of them."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; auto takes what is fast here for an adapter, float32 for full weights."""
    bf16: bool = False
    """Compute in bfloat16 while the weights stay in their precision (autocast)."""
    loss_examples: _Count = 64
    """Training examples whose loss without edits is measured at the end, at most."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the adapter's first values and of the order of the data."""
    log_every: _Count = 1
    """Optimizer steps between two lines of metrics.jsonl."""
    evaluate_every: _Count | None = None
    """Optimizer steps between two losses on the held-out data; null takes it at the end only."""
    save_every: _Count | None = None
    """Optimizer steps between two checkpoints, from which the same command goes on; null saves none."""
    keep_checkpoints: _Count = 2
    """How many of the newest checkpoints stay."""
    report_to: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Where metrics go besides metrics.jsonl."""
    watch: WatchSettings = WatchSettings()
    """Projections of held-out prompts during training."""

    @model_validator(mode="after")
    def _goes_together(self) -> FinetuneConfig:
        if (self.method in UNDER_EDITS) != (self.edits is not None):
            needs = "needs edits, such as impolite@18:+2" if self.edits is None else "takes no edits"
            raise ValueError(f"method {self.method} {needs}")
        if self.penalty is not None and self.method is not Method.REGULARISED:
            raise ValueError(f"penalty is for method regularised, this is {self.method}")
        if self.prompt is not None and self.method is not Method.PROMPTED:
            raise ValueError(f"prompt is for method prompted, this is {self.method}")
        if self.weights == "full" and (self.method is Method.REGULARISED or self.lora != LoraSettings()):
            what = (
                "method regularised compares with the model without its adapter" if self.lora == LoraSettings() else ""
            )
            raise ValueError(f"{what or 'lora is set'}, and weights full trains no adapter")
        if self.weights == "full" and self.dtype in ("bfloat16", "float16"):
            raise ValueError(f"full weights in {self.dtype} lose small updates; take dtype float32 with bf16 true")
        return self


def read_config(path: Path | str) -> dict[str, Any]:
    """The fields in a YAML file, not checked yet.

    Raises:
        FinetuningError: If there is no such file, or it is not YAML with fields.
    """
    try:
        found = read_yaml(path)
    except DocumentError as error:
        raise FinetuningError(f"the configuration {error}") from error
    if not isinstance(found, dict | None):
        raise FinetuningError(f"{path} must hold fields such as learning_rate: 1.0e-5, but is a {type(found).__name__}")
    return found or {}


def make_config(fields: dict[str, Any], place: str = "the configuration") -> FinetuneConfig:
    """A configuration of fields.

    Args:
        fields: By name, as in the YAML file.
        place: Where they come from, for messages.

    Raises:
        FinetuningError: If a field is unknown or its value is not possible; all that is wrong is named.
    """
    try:
        return FinetuneConfig.model_validate(fields)
    except ValidationError as error:
        raise FinetuningError("\n".join(f"{place}: {_problem(each)}" for each in error.errors())) from None


def _problem(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        inside: Any = {"lora": LoraSettings, "watch": WatchSettings}.get(where.partition(".")[0], FinetuneConfig)
        return f"there is no field {where}; there are {', '.join(inside.model_fields)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}, got {shown(error['input'])}" if where and "input" in error else message


def documented(config: FinetuneConfig | None = None) -> str:
    """A configuration as YAML with every field and, above each, what it means."""
    return "\n".join(_documented(config or FinetuneConfig(), "")) + "\n"


def _documented(model: BaseModel, indent: str) -> list[str]:
    lines: list[str] = []
    dumped = model.model_dump(mode="json")
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        about = textwrap.wrap(field.description or "", 100 - len(indent))
        lines += [f"{indent}# {line}" for line in about]
        if isinstance(value, BaseModel):
            lines += [f"{indent}{name}:", *_documented(value, indent + "  ")]
        else:
            written = yaml.safe_dump(dumped[name], default_flow_style=True, width=10**6, allow_unicode=True)
            lines.append(f"{indent}{name}: {written.removesuffix('...' + chr(10)).strip()}")
    return lines
