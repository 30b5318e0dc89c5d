"""Sampling in vLLM as all backends do it: seeded noise, thinking closed where none is left, and the largest logit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from persona_lens.backend.parts.asked import Limited
from persona_lens.backend.parts.budget import ThinkingBudget, forcing
from persona_lens.backend.sampling import Noise, add_draws
from persona_lens_vllm.tags import Here, check_tag, tag_of


class _Draws:
    """The draws of one row: one for each token that it was given, whatever was thrown away in between.

    Args:
        noise: Its ``seed``, ``temperature``, ``top_p``, and how many draws went ``before``, none unless it says so.
        given: The row's tokens so far, which vLLM goes on filling.
    """

    def __init__(self, noise: dict[str, Any], given: list[int]) -> None:
        self.how = (float(noise["temperature"]), float(noise["top_p"]))
        self._noise = Noise(int(noise["seed"]))
        self._before, self._given = int(noise.get("before", 0)), given

    def next(self, size: int, device: torch.device) -> Tensor:
        """The draw for its next token; the same again where the last token was thrown away, as vLLM may do."""
        return self._noise.draw(self._before + len(self._given), size, device)


class _Thinking:
    """The thinking that is left to one row, whatever was thrown away in between.

    Args:
        limited: How far it may think.
        prompt: Its prompt.
        given: The row's tokens so far, which vLLM goes on filling.
    """

    def __init__(self, limited: Limited, prompt: list[int], given: list[int]) -> None:
        self._limited, self._prompt, self._given = limited, prompt, given
        self._begin()

    def _begin(self) -> None:
        self._budget, self._taken = self._limited.parts.budget(self._prompt, self._limited.most), 0

    def left(self) -> ThinkingBudget:
        """What is left behind the tokens that are there."""
        if len(self._given) < self._taken:
            self._begin()
        for token in self._given[self._taken :]:
            self._budget.take(token)
        self._taken = len(self._given)
        return self._budget


class SeededRows(LogitsProcessor):  # type: ignore[misc]
    """Does with the logits of rows what `persona_lens.backend.sampling.RowSampler` does, as far as they ask for it."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """See `persona_lens_vllm.tags.check_tag`."""
        check_tag(sampling_params)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._draws: dict[int, _Draws] = {}
        self._thinking: dict[int, _Thinking] = {}

    def is_argmax_invariant(self) -> bool:
        """It is not: vLLM must call it although it takes the largest logit."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Note which rows came, went and moved."""

        def drawn(params: Any, _: Any, given: list[int]) -> _Draws | None:
            noise = tag_of(params).get("noise")
            return _Draws(noise, given) if noise else None

        def thinking(params: Any, prompt: list[int] | None, given: list[int]) -> _Thinking | None:
            limited = Here.limits.get(tag_of(params).get("call", ""))
            return None if limited is None else _Thinking(limited, prompt or [], given)

        process_dict_updates(self._draws, batch_update, drawn)
        process_dict_updates(self._thinking, batch_update, thinking)

    def apply(self, logits: Tensor) -> Tensor:
        """Add the next draw of every row, and close thinking."""
        return forcing(
            add_draws(logits, self._draws), {row: thinking.left() for row, thinking in self._thinking.items()}
        )
