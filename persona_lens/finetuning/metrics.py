"""`MetricsFile`: what a Trainer logs, as lines of a run folder's ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from persona_lens.progress import Progress
from persona_lens.runs import RunFolder

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
        self._say(args, state, 0)

    def _say(self, args: Any, state: Any, batches: int) -> None:
        each = args.gradient_accumulation_steps
        self._progress(state.global_step * each + batches, state.max_steps * each, "finetuning")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin to count the batches of a step."""
        self._batches = 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say how far it is: a step may consist of many batches, and take minutes."""
        self._batches += 1
        self._say(args, state, self._batches)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say how far it is."""
        self._batches = 0
        self._say(args, state, 0)

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
