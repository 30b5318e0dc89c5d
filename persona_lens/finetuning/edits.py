"""`TrainingEdits`: edits that act while a module trains, and only then; `PreventativeSteering` for a Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer
from transformers import TrainerCallback

from persona_lens.backend import Edit, Operation, Schedule
from persona_lens.backend.blocks import bare_model, find_blocks, require_reached, text_config
from persona_lens.backend.editing import check_everywhere, hooking_blocks, module_limits, written_everywhere
from persona_lens.backend.sinks import depend_on_sinks
from persona_lens.backend.writing import Writer
from persona_lens.finetuning.config import FinetuningError
from persona_lens.steering.given import GivenEdits, GivenVectors, given_edits


class TrainingEdits:
    """Edits in every training forward of a model, from `open` to `close`, or inside ``with``.

    A block is edited while it is in training mode, so that evaluation in the middle of training runs unedited. Under
    gradient checkpointing the second forward of a block is edited as the first was. What is written is no parameter:
    nothing of it is ever saved with the model. Inside ``with`` nothing is left behind, whatever happens there.

    Training does not know which token of a row comes first, so an edit's schedule counts optimizer steps here, from 0:
    ``schedule(0:1 100:0)`` fades the edit out over 100 steps. Set `step`, or give the optimizer, whose steps are then
    counted.

    The blocks of wrapped models are found too: PEFT, ``torch.compile`` (wrapped afterwards), and accelerate's
    DistributedDataParallel and FullyShardedDataParallel. Each process edits its own forwards, which run over whole
    residual vectors in both: DDP copies the model, and FSDP shards parameters, not activations, and gathers them before
    a block runs, so a hook on the block sees what it would see on one device. Every process needs the same edits.

    Edits that leave attention sinks out (`persona_lens.backend.sinks`) do so here too. How long a residual has to be
    for one is measured on the model as it is given, without its adapter, by one small forward pass.

    Args:
        model: A Hugging Face causal language model, wrapped or not.
        edits: What to write: one, several, a steering, or its notation. Directions are those of the paper's
            preventative steering (method, section 6): add what the training data would otherwise teach.
        vectors: Those that a notation names.
        optimizer: Whose steps the schedules count.
        sink_limits: Of a backend of the model before training, where there is one; measured if needed and not given.

    Raises:
        EditError: If an edit does not fit the model, or names positions.
        FinetuningError: If a schedule takes an edit out of its range.
        UnsupportedModelError: If the model has no blocks that can be found.
    """

    def __init__(
        self,
        model: Any,
        edits: GivenEdits,
        *,
        vectors: GivenVectors = None,
        optimizer: Optimizer | None = None,
        sink_limits: Sequence[float] | None = None,
    ) -> None:
        bare = bare_model(model)
        self._blocks = find_blocks(bare)[1]
        self.edits = given_edits(edits, vectors)
        check_everywhere(self.edits, len(self._blocks), text_config(bare.config).hidden_size)
        for edit in self.edits:
            _check_schedule(edit)
        self._optimizer = optimizer
        self._hooks: ExitStack | None = None
        self._reached: set[int] = set()
        self._trained = False
        self._writers: dict[tuple[float, ...], Writer] = {}
        self._writer = self._writer_at(0)
        self._step = 0
        if sink_limits is None and depend_on_sinks(self.edits):
            sink_limits = module_limits(model, self._blocks, bare.config)
        self._sink_limits = sink_limits

    @property
    def step(self) -> int:
        """Optimizer steps done, which the schedules go by."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step
        self._writer = self._writer_at(step)

    @property
    def is_open(self) -> bool:
        """Whether training forwards are edited now."""
        return self._hooks is not None

    def open(self) -> None:
        """Begin to edit."""
        if self._hooks is not None:
            return
        self._reached, self._trained = set(), False
        with ExitStack() as hooks:
            hooks.enter_context(hooking_blocks(self._blocks, sorted(self._writer.layers), self._write))
            if self._optimizer is not None:
                hooks.callback(self._optimizer.register_step_post_hook(self._count).remove)
            self._hooks = hooks.pop_all()

    def close(self) -> None:
        """Leave the model as it was.

        Raises:
            UnsupportedModelError: If a block to be edited never ran, while others did or the optimizer stepped.
        """
        if self._hooks is not None:
            self._hooks.close()
            self._hooks = None
            if self._reached or self._trained:
                require_reached(sorted(self._writer.layers - self._reached))

    def __enter__(self) -> TrainingEdits:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._reached, self._trained = set(), False  # what went wrong is more to the point than what never ran
        self.close()

    def _write(self, layer: int, h: Tensor, given: Mapping[str, Any]) -> Tensor:
        self._reached.add(layer)
        if not self._blocks[layer].training:
            return h
        return written_everywhere(self._writer, layer, h, given, self._sink_limits)

    def _count(self, *_: object) -> None:
        self._trained = True
        self.step += 1

    def _writer_at(self, step: int) -> Writer:
        """The writer whose edits are as strong as they are at this step, made once for each strength."""
        factors = tuple(factor_at(edit.schedule, step) for edit in self.edits)
        if factors not in self._writers:
            self._writers = {factors: Writer([_scaled(e, f).plain() for e, f in zip(self.edits, factors, strict=True)])}
        return self._writers[factors]


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


def factor_at(schedule: Schedule | None, step: int) -> float:
    """The factor of a schedule at an optimizer step."""
    if schedule is None:
        return 1.0
    places, factors = zip(*schedule.points, strict=True)
    return float(np.interp(step, places, factors))


def _scaled(edit: Edit, factor: float) -> Edit:
    return replace(edit, coefficient=edit.coefficient * factor, schedule=None)


def _check_schedule(edit: Edit) -> None:
    if edit.schedule is None or edit.operation is Operation.ADD:
        return
    strengths = [factor * float(edit.coefficient) for _, factor in edit.schedule.points]
    if min(strengths) < 0 or max(strengths) > 1:
        raise FinetuningError(
            f"the schedule({edit.schedule}) takes {edit.operation} out of its range: a share from 0 to 1 of it is made"
        )
