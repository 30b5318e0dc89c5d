"""Sampling in vLLM as all backends do it: noise seeded row by row, then the largest logit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from persona_lens.backend.sampling import add_draws
from persona_lens_vllm.tags import check_tag, tag_of


class _Draws:
    """The draws of one row: one for each token that it was given, whatever was thrown away in between.

    Args:
        noise: Its ``seed``, ``temperature``, ``top_p``, and how many draws went ``before``, none unless it says so.
        given: The row's tokens so far, which vLLM goes on filling.
    """

    def __init__(self, noise: dict[str, Any], given: list[int]) -> None:
        self.how = (float(noise["temperature"]), float(noise["top_p"]))
        self._seed, self._before, self._given = int(noise["seed"]), int(noise.get("before", 0)), given
        self._generator: torch.Generator | None = None
        self._made = 0
        self._state = torch.empty(0)

    def fill(self, row: Tensor) -> None:
        """Fill the row with the draw for its next token."""
        wanted = self._before + len(self._given) + 1
        if self._generator is None:
            self._generator = torch.Generator(row.device).manual_seed(self._seed)
        if self._made == wanted:  # the last token was thrown away, as those of a part of a prompt are: draw it again
            self._generator.set_state(self._state)
            self._made -= 1
        while self._made < wanted:  # several after the row was thrown out and begun again
            self._state = self._generator.get_state()
            row.exponential_(generator=self._generator)
            self._made += 1


class SeededRows(LogitsProcessor):  # type: ignore[misc]
    """Adds the noise of `persona_lens.backend.sampling.RowSampler` to the logits of rows that ask for it."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """See `persona_lens_vllm.tags.check_tag`."""
        check_tag(sampling_params)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, _Draws] = {}

    def is_argmax_invariant(self) -> bool:
        """It is not: vLLM must call it although it takes the largest logit."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Note which rows came, went and moved."""

        def new(params: Any, _: Any, given: list[int]) -> _Draws | None:
            noise = tag_of(params).get("noise")
            return _Draws(noise, given) if noise else None

        process_dict_updates(self._rows, batch_update, new)

    def apply(self, logits: Tensor) -> Tensor:
        """Add the next draw of every row."""
        return add_draws(logits, self._rows)
