"""`PreventativeSteering`: training under edits as a callback of Hugging Face's Trainer, and of those made from it."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from transformers import TrainerCallback

from persona_lens.finetuning.edits import TrainingEdits
from persona_lens.finetuning.errors import FinetuningError
from persona_lens.steering.given import GivenEdits, GivenVectors, given_edits


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
