"""From logits to tokens: one sampler for every backend, seeded row by row; and log-probabilities of given tokens.

Runs where the model runs, see `writing`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from persona_lens.backend.parts.budget import forcing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Protocol

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from persona_lens.backend.parts.budget import ThinkingBudget
    from persona_lens.backend.tokens import Sampling

    class Draws(Protocol):
        """The noise of one row."""

        @property
        def how(self) -> tuple[float, float]:
            """Temperature, and the nucleus of the sampling."""
            ...

        def fill(self, row: Float[Tensor, " vocab"]) -> None:
            """Fill the row with the next draw of an exponential distribution."""
            ...


class RowSampler:
    """Turns logits into logits whose argmax is the token that follows.

    Args:
        sampling: Temperature above 0, and a seed for each row; greedy without seeds.
        device: Where noise is drawn; logits from elsewhere are brought here. None draws it where the first logits
            are. The same seeds give other tokens on another kind of device.
        budgets: The thinking that is left to each row, if it is limited.
    """

    def __init__(
        self, sampling: Sampling, device: torch.device | None = None, budgets: Sequence[ThinkingBudget] = ()
    ) -> None:
        self.temperature = sampling.temperature
        self.top_p = sampling.top_p
        self.device = device
        self.seeds = sampling.seeds or ()
        self.budgets = dict(enumerate(budgets))
        self.generators: list[torch.Generator] = []  # made when the first logits are there: they cannot be sent
        self._begun = False

    @property
    def acts(self) -> bool:
        """Whether it changes logits at all."""
        return bool(self.seeds or self.budgets)

    def __call__(
        self, logits: Float[Tensor, "batch vocab"], newest: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch vocab"]:
        """Add the next draw of every row's noise, and then close thinking where none is left.

        Args:
            logits: Next-token logits, any float dtype.
            newest: The tokens before these, the prompts' last at first; needed where thinking is limited.

        Returns:
            float32 [batch, vocab]; greedy ones as they came where nothing is closed.
        """
        noisy = self._noisy(logits) if self.seeds else logits
        if not self.budgets:
            return noisy
        assert newest is not None
        for row, token in enumerate(newest.tolist() if self._begun else ()):
            self.budgets[row].take(token)
        self._begun = True
        return forcing(noisy, self.budgets)

    def _noisy(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
        if not self.generators:
            self.device = self.device or logits.device
            self.generators = [torch.Generator(self.device).manual_seed(seed) for seed in self.seeds]
        wide = logits.to(self.device).float()
        noise = torch.empty_like(wide)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return noisy_logits(wide, noise, self.temperature, self.top_p)


def noisy_logits(
    logits: Float[Tensor, "batch vocab"], exponential: Float[Tensor, "batch vocab"], temperature: float, top_p: float
) -> Float[Tensor, "batch vocab"]:
    """Logits whose argmax is a sample, from draws of an exponential distribution, which are overwritten."""
    # Counted from the largest: divided by a small temperature, large logits would all become infinite.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_p < 1:
        scaled = keep_nucleus(scaled, top_p)
    # -log of an exponential draw is a Gumbel draw; the clamp keeps a draw of exactly 0 from always winning.
    return scaled - exponential.clamp_(min=torch.finfo(torch.float32).tiny).log_()


def add_draws(logits: Float[Tensor, "rows vocab"], draws: Mapping[int, Draws]) -> Float[Tensor, "rows vocab"]:
    """The logits with the next draw of some of their rows added in place; each row is sampled in its own way."""
    alike: dict[tuple[float, float], list[int]] = {}
    for row, drawn in draws.items():
        alike.setdefault(drawn.how, []).append(row)
    for (temperature, top_p), rows in alike.items():
        noise = torch.empty(len(rows), logits.shape[1], dtype=torch.float32, device=logits.device)
        for place, row in zip(noise, rows, strict=True):
            draws[row].fill(place)
        logits[rows] = noisy_logits(logits[rows].float(), noise, temperature, top_p).to(logits.dtype)
    return logits


def keep_nucleus(logits: Float[Tensor, "batch vocab"], top_p: float) -> Float[Tensor, "batch vocab"]:
    """Logits with every token outside the smallest set of probability ``top_p`` at minus infinity."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probability = ordered.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability
    outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return logits.masked_fill(outside, -torch.inf)


def response_logprobs(
    logits: Float[Tensor, "batch kept vocab"],
    ids: Int[Tensor, "batch width"],
    response: Bool[Tensor, "batch width"],
) -> tuple[Tensor, ...]:
    """Log-probability of every response token, from the logits at the last positions of a left-padded batch.

    Args:
        logits: Of the last ``kept`` positions, at least one more than the longest response.
        ids: Token ids.
        response: True at response tokens.

    Returns:
        float32 [response tokens] on the CPU for each row, in nats.
    """
    stop, lengths = logits.shape[1] - 1, response.sum(dim=1).tolist()
    targets = ids.to(logits.device)
    # Row by row: float32 logits of a whole batch can be many gigabytes. A device is waited for once, at the end.
    chosen = [
        chosen_logprobs(logits[row, stop - length : stop], targets[row, targets.shape[1] - length :])
        for row, length in enumerate(lengths)
    ]
    together: Sequence[Tensor] = torch.cat(chosen).cpu().split(lengths)  # type: ignore[no-untyped-call]
    return tuple(part.clone() for part in together)


def continued_logprobs(
    before: Float[Tensor, "1 vocab"], logits: Float[Tensor, "width vocab"], ids: Sequence[int]
) -> Float[Tensor, " tokens"]:
    """The same for one response that follows a prompt computed before.

    Args:
        before: Logits at the prompt's last token.
        logits: At the response's own tokens; the last of them is not needed.
        ids: The response, at least one token.
    """
    predicting = torch.cat([before.to(logits.device), logits[: len(ids) - 1]])
    return token_logprobs(predicting, torch.tensor(ids, dtype=torch.long, device=logits.device))


def token_logprobs(logits: Float[Tensor, "tokens vocab"], ids: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """Log-probability of each id: float32 [tokens] on the CPU, from logits of any precision."""
    return chosen_logprobs(logits, ids).cpu().clone()


def chosen_logprobs(logits: Float[Tensor, "tokens vocab"], ids: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """The same where the logits are, for which a device need not be waited for."""
    wide = logits.float()
    return wide.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - wide.logsumexp(dim=-1)
