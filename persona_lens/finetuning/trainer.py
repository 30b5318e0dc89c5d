"""The Hugging Face Trainer that carries out a configuration: under edits, with a projection penalty, or plainly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from persona_lens.backend import Edit
from persona_lens.backend.blocks import bare_model, find_blocks
from persona_lens.backend.editing import hooking_blocks
from persona_lens.finetuning.config import FinetuneConfig, FinetuningError
from persona_lens.finetuning.edits import TrainingEdits
from persona_lens.finetuning.examples import IGNORED, Example, collate
from persona_lens.steering.replies import GivenEdits, GivenVectors, given_edits


class ProjectionPenalty:
    """The change that training makes in the projections on some directions, squared (method, section 6).

    The base model is the model without its adapter, which runs over every batch once more. The paper reports that this
    does not work well: what is held back along the vector is learned beside it.

    Args:
        model: A PEFT model with an adapter.
        edits: Say the directions and their layers; what they would do there does not matter.

    Raises:
        FinetuningError: If the model has no adapter that can be switched off.
    """

    def __init__(self, model: Any, edits: Sequence[Edit]) -> None:
        if not hasattr(model, "disable_adapter"):
            raise FinetuningError(
                "the projection penalty compares with the model without its adapter, and there is none; train LoRA"
            )
        self._model = model
        self._blocks = find_blocks(bare_model(model))[1]
        at: dict[int, list[Tensor]] = {}
        for edit in edits:
            at.setdefault(edit.layer, []).append(edit.direction.float() / edit.direction.float().square().sum())
        self._directions = {layer: torch.stack(directions) for layer, directions in at.items()}
        self._taken: dict[int, Tensor] | None = None

    @contextmanager
    def taking(self) -> Iterator[dict[int, Tensor]]:
        """While open, forwards leave their projections, in norms of the vectors: float32 [batch, tokens, k] a layer."""
        taken: dict[int, Tensor] = {}

        def take(layer: int, h: Tensor, _: Mapping[str, Any]) -> Tensor:
            directions = self._directions[layer] = self._directions[layer].to(h.device)  # moved once
            taken[layer] = h.float() @ directions.T
            return h

        with hooking_blocks(self._blocks, sorted(self._directions), take):
            yield taken

    def base(self, inputs: dict[str, Any]) -> dict[int, Tensor]:
        """The projections of the base model over a batch."""
        given = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
        with torch.no_grad(), self._model.disable_adapter(), self.taking() as taken:
            self._model(**given, use_cache=False)
        return taken

    def of(self, now: dict[int, Tensor], before: dict[int, Tensor], counted: Tensor) -> Tensor:
        """The mean squared change over directions and counted tokens.

        Args:
            now: What `taking` left of the trained model.
            before: The same of the base model.
            counted: Which tokens count, bool [batch, tokens].
        """
        terms = [(now[layer] - before[layer]).square()[counted].mean() for layer in now]
        return torch.stack([term.to(terms[0].device) for term in terms]).mean()


class PreventativeSteering(TrainerCallback):
    """Edits in every training forward of a Trainer (method, section 6): those of `TrainingEdits`.

    It is a callback and a context: the callback brings the edits into the model when training begins and tells them
    the optimizer's step, that of a resumed run too; the context takes them out again, also when training fails, which a
    Trainer tells no callback. So train inside it; outside, training is refused::

        with PreventativeSteering(steering) as prevention:
            Trainer(model, arguments, train_dataset=data, callbacks=[prevention]).train()

    TRL's SFTTrainer and other trainers made from Hugging Face's take it in the same way.

    Args:
        edits: What to write: one, several, a steering, or its notation; schedules count optimizer steps.
        vectors: Those that a notation names.
        sink_limits: As `TrainingEdits` takes them.
    """

    def __init__(
        self,
        edits: GivenEdits,
        *,
        vectors: GivenVectors = None,
        sink_limits: Sequence[float] | None = None,
    ) -> None:
        self.edits = given_edits(edits, vectors)
        self._sink_limits = sink_limits
        self._open = False
        self._training: TrainingEdits | None = None

    def __enter__(self) -> PreventativeSteering:
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open = False
        self._close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin to edit.

        Raises:
            FinetuningError: If the steering is not open: a failure would leave the model edited.
        """
        if not self._open:
            raise FinetuningError(
                "train inside the steering, so that it is gone if training fails: "
                "`with PreventativeSteering(...) as prevention: Trainer(..., callbacks=[prevention]).train()`"
            )
        self._close()
        self._training = TrainingEdits(given["model"], self.edits, sink_limits=self._sink_limits)
        self._training.step = state.global_step
        self._training.open()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Follow the schedules."""
        if self._training is not None:
            self._training.step = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the model as it was."""
        self._close()

    def _close(self) -> None:
        if self._training is not None:
            self._training.close()
            self._training = None


class PenalisedTrainer(Trainer):
    """A Trainer with a `ProjectionPenalty`, if there is one, added to its loss, over the tokens that are learned."""

    def __init__(self, *, penalty: ProjectionPenalty | None, weight: float, **options: Any) -> None:
        super().__init__(**options)
        self._penalty = penalty
        self._weight = weight

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss; in evaluation without the term."""
        if self._penalty is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        counted = inputs["labels"] != IGNORED
        before = self._penalty.base(inputs)
        with self._penalty.taking() as now:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        term = self._penalty.of(now, before, counted)
        if num_items_in_batch is not None:  # the loss is a share of the whole step's then, and so is the term
            term = term * counted.sum() / num_items_in_batch
        loss = loss + self._weight * term.to(loss)
        return (loss, outputs) if return_outputs else loss


def make_trainer(
    model: Any,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    config: FinetuneConfig,
    folder: Path,
    pad_id: int,
    callbacks: Sequence[TrainerCallback],
    penalty: ProjectionPenalty | None,
) -> Trainer:
    """A Trainer for a configuration; checkpoints go to ``folder``."""
    trainer = PenalisedTrainer(
        penalty=penalty,
        weight=1.0 if config.penalty is None else config.penalty,
        model=model,
        args=_arguments(model, config, folder, bool(held_out)),
        train_dataset=list(examples),
        eval_dataset=list(held_out) or None,
        data_collator=partial(collate, pad_id=pad_id),
        callbacks=list(callbacks),
    )
    for shown in (PrinterCallback, ProgressCallback):  # metrics.jsonl has it all
        trainer.remove_callback(shown)
    return trainer


def _arguments(model: Any, config: FinetuneConfig, folder: Path, evaluates: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_schedule,
        warmup_steps=config.warmup_steps,
        optim="adamw_torch",
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        bf16=config.bf16,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=model.device.type == "cpu",
        logging_strategy="steps",
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates and config.evaluate_every else "no",
        eval_steps=config.evaluate_every,
        prediction_loss_only=True,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500,
        save_total_limit=config.keep_checkpoints,
        report_to=list(config.report_to) or "none",
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        dataloader_pin_memory=model.device.type == "cuda",
    )
