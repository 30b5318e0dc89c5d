"""The Hugging Face Trainer that carries out a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from persona_lens.finetuning.config import FinetuneConfig
from persona_lens.finetuning.examples import IGNORED, Example, collate
from persona_lens.finetuning.penalty import ProjectionPenalty


class PenalisedTrainer(Trainer):
    """A Trainer with `ProjectionPenalty` added to its loss, over the tokens that are learned."""

    def __init__(self, *args: Any, penalty: ProjectionPenalty, weight: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._penalty = penalty
        self._weight = weight

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss; in evaluation without the term."""
        if not model.training:
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
    made: Any = PenalisedTrainer if penalty is not None else Trainer
    options: dict[str, Any] = {}
    if penalty is not None:
        options = {"penalty": penalty, "weight": 1.0 if config.penalty is None else config.penalty}
    trainer: Trainer = made(
        model=model,
        args=_arguments(model, config, folder, bool(held_out)),
        train_dataset=list(examples),
        eval_dataset=list(held_out) or None,
        data_collator=partial(collate, pad_id=pad_id),
        callbacks=list(callbacks),
        **options,
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
