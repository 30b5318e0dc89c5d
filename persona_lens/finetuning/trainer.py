"""The Hugging Face Trainer that carries out a configuration, its projection penalty, and what it calls as it goes.

That is `MetricsFile`, `CheckedCheckpoints`, and `ProjectionWatch`, which may stop it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from persona_lens.backend import Edit, wrap_model
from persona_lens.backend.blocks import bare_model, find_blocks
from persona_lens.backend.editing import hooking_blocks
from persona_lens.core.files import PART, named, remove, sentence, sha256_of, sync_folder, write_text
from persona_lens.core.progress import Progress, note
from persona_lens.finetuning.config import FinetuneConfig, FinetuningError
from persona_lens.finetuning.examples import IGNORED, Example, collate
from persona_lens.monitoring.scoring import prompt_projections
from persona_lens.runs import RunFolder
from persona_lens.vectors import PersonaVectors


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


METRICS = "metrics.jsonl"
# What tells of this process, not of the run: clock times, and a mean loss that counts the steps since it was resumed.
_CLOCK = ("runtime", "per_second", "total_flos", "train_loss")


class MetricsFile(TrainerCallback):
    """Appends what is logged, clock times left out; a resumed run goes on behind the step it resumes from.

    Args:
        folder: The run.
        progress: Told how many batches are done, and of how many the loss was looked at afterwards.
    """

    def __init__(self, folder: RunFolder, progress: Progress) -> None:
        self._folder = folder
        self._progress = progress
        self._batches = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget lines of what will be done again: those that the checkpoint does not know."""
        lines = [_line(logged["step"], logged) for logged in state.log_history]
        self._folder.write_lines(METRICS, [line for line in lines if line], replace=True)
        self._say(args, state)

    def _say(self, args: Any, state: Any) -> None:
        each = args.gradient_accumulation_steps
        self._progress(state.global_step * each + self._batches, state.max_steps * each, "finetuning")

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say how far it is: a step may consist of many batches, and take minutes."""
        self._batches += 1
        self._say(args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say how far it is."""
        self._batches = 0
        self._say(args, state)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        """Say of how many batches the loss was looked at."""
        self._batches += 1
        self._progress(self._batches, None if eval_dataloader is None else len(eval_dataloader), "measuring the loss")

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin to count anew."""
        self._batches = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Write a line."""
        line = _line(state.global_step, logs or {})
        if line:
            self._folder.append(METRICS, [line])


def _line(step: int, logged: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is kept of something logged; None if nothing is."""
    kept = {name: value for name, value in sorted(logged.items()) if not any(part in name for part in _CLOCK)}
    return {"step": step, **kept} if set(kept) - {"epoch", "step"} else None


CHECKSUMS = "checksums.json"


class TrainedError(Exception):
    """The checkpoint that training goes on from is that of its last step. A Trainer would take one step more."""


class CheckedCheckpoints(TrainerCallback):
    """Writes the checksums of a checkpoint's files beside them, as its last file.

    It is the last callback: where the checkpoint's step was the last one, it ends training with `TrainedError` when
    all is as it was after that step.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint may have been loaded."""
        saved = state.stateful_callbacks.get("TrainerControl", {})
        if state.global_step and (
            saved.get("args", {}).get("should_training_stop") or state.global_step >= state.max_steps
        ):
            raise TrainedError

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint has been saved."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for file in sorted(folder.rglob("*")):
            sync_folder(file)
        write_text(folder / CHECKSUMS, json.dumps(_checksums(folder), indent=1) + "\n", failed=FinetuningError)


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is as it was written; what is newer goes."""
    found = [each for each in folder.glob("checkpoint-*") if each.name.removeprefix("checkpoint-").isdecimal()]
    for each in sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        if _is_whole(each):
            return str(each)
        if (each / CHECKSUMS).exists():  # without, it was merely interrupted
            note(f"{each} is damaged; training goes on from the checkpoint before it")
        with named(each, FinetuningError, "removed"):
            remove(each)
    return None


@contextmanager
def named_writes(folder: Path) -> Iterator[None]:
    """What libraries raise when they cannot write, as an error that names the folder."""
    try:
        yield
    except OSError as error:
        raise FinetuningError(sentence(error, error.filename or folder)) from error
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, SafetensorError) or "PytorchStreamWriter" in str(error) or "file write" in str(error):
            raise FinetuningError(f"{folder} cannot be written: {error}; make room there") from error
        raise


def _is_whole(checkpoint: Path) -> bool:
    try:
        expected = json.loads((checkpoint / CHECKSUMS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return bool(expected) and expected == _checksums(checkpoint)


def _checksums(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.endswith(PART))
    return {file.relative_to(folder).as_posix(): sha256_of(file) for file in files if file.name != CHECKSUMS}


PREFIX = "projection/"


class ProjectionWatch(TrainerCallback):
    """Projects prompts on traits every n optimizer steps, in evaluation mode and so without training's edits.

    Each look gives ``projection/TRAIT@LAYER``, the mean over prompts of the last prompt token's projection on the unit
    vector, in residual-stream units. Where several processes train, each looks, so that all of them stop together.

    Args:
        prompts: Token ids as `ChatFormat.encode` gives them.
        vectors: The traits.
        layers: Block indices, 0-based.
        tokenizer: The model's.
        every: Optimizer steps between two looks; there is one before training, too.
        stop_above: Stop training as soon as a mean has risen by more than this since the first look; None never stops.
        log: Told what is seen, such as ``trainer.log``; None only keeps it in `rows`.

    Attributes:
        rows: What was seen: ``step`` and the projections by name.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        vectors: Sequence[PersonaVectors],
        layers: Sequence[int],
        tokenizer: Any,
        *,
        every: int,
        stop_above: float | None = None,
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        if every < 1:
            raise FinetuningError(f"a watch looks every 1 or more optimizer steps, got {every}")
        if not prompts or not vectors or not layers:
            raise FinetuningError("a watch needs prompts, vectors and layers: there are none")
        self.prompts, self.vectors, self.layers = prompts, list(vectors), list(layers)
        self.tokenizer, self.every, self.stop_above, self.log = tokenizer, every, stop_above, log
        self.rows: list[dict[str, float]] = []

    @property
    def stopped(self) -> str | None:
        """Why training was stopped, by what was seen first and last; None if it was not."""
        if self.stop_above is None or len(self.rows) < 2:
            return None
        first, last = self.rows[0], self.rows[-1]
        for name in reversed(last):
            risen = last[name] - first[name]
            if name != "step" and risen > self.stop_above:
                return (
                    f"{name.removeprefix(PREFIX)} has risen by {risen:.3g} since before training, above "
                    f"{self.stop_above:g}, at step {last['step']}"
                )
        return None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look before training, unless it goes on from a checkpoint whose first look is known."""
        if state.global_step:
            seen = [{k: v for k, v in row.items() if k.startswith(PREFIX)} for row in state.log_history]
            steps = [row["step"] for row in state.log_history]
            self.rows = [{"step": at, **own} for at, own in zip(steps, seen, strict=True) if own] or self.rows
        else:
            self.rows = []
        if not self.rows:
            self._look(given["model"], state.global_step, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look, if it is time to."""
        if state.global_step % self.every:
            return
        self._look(given["model"], state.global_step, control)
        if self.stopped:
            control.should_training_stop = True

    def _look(self, model: Any, step: int, control: Any) -> None:
        backend = wrap_model(bare_model(model), self.tokenizer)
        found = prompt_projections(backend, self.prompts, self.vectors, self.layers, allow_other_model=True)
        means = found.mean(dim=0)
        seen = {
            f"{PREFIX}{vectors.trait}@{layer}": float(means[i, j])
            for i, vectors in enumerate(self.vectors)
            for j, layer in enumerate(self.layers)
        }
        self.rows.append({"step": step, **seen})
        if self.log is not None:
            due = control.should_log  # logging takes this for done, and the loss of the step would be missing
            self.log(dict(seen))
            control.should_log = due
