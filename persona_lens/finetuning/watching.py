"""`ProjectionWatch`: where held-out prompts stand on traits while a model is trained, and stopping on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback

from persona_lens.backend import wrap_model
from persona_lens.backend.blocks import bare_model
from persona_lens.finetuning.errors import FinetuningError
from persona_lens.monitoring.prompts import prompt_projections
from persona_lens.vectors import PersonaVectors

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
        stopped: Why training was stopped; None if it was not.
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
        self.stopped: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look before training, unless it goes on from a checkpoint whose first look is known."""
        if state.global_step:
            seen = [row for row in state.log_history if any(key.startswith(PREFIX) for key in row)]
            values = [{k: v for k, v in row.items() if k.startswith(PREFIX)} for row in seen]
            self.rows = [{"step": row["step"], **own} for row, own in zip(seen, values, strict=True)] or self.rows
        else:
            self.rows, self.stopped = [], None
        if self.rows:
            self._judge()
        else:
            self._look(given["model"], state.global_step, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look, if it is time to."""
        if state.global_step % self.every:
            return
        self._look(given["model"], state.global_step, control)
        self._judge()
        if self.stopped:
            control.should_training_stop = True

    def _judge(self) -> None:
        first, last = self.rows[0], self.rows[-1]
        for name in last:
            risen = last[name] - first[name]
            if self.stop_above is not None and name != "step" and risen > self.stop_above:
                trait = name.removeprefix(PREFIX)
                self.stopped = (
                    f"{trait} has risen by {risen:.3g} since before training, above {self.stop_above:g}, "
                    f"at step {last['step']}"
                )

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
