"""From logits to tokens: one sampler for every backend, seeded row by row; and log-probabilities of given tokens.

Runs where the model runs, see `writing`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

        def next(self, size: int, device: torch.device) -> Float[Tensor, " vocab"]:
            """The next of them, see `Noise`."""
            ...


# A kernel for each row and step is much of what a step takes, so a row's noise is drawn for several steps at once: for
# so many at most, and no more numbers than these, which are 4 MiB.
_STEPS, _NUMBERS = 16, 2**20


class Noise:
    """The noise of one row, which its seed alone decides: draws of an exponential distribution, one after another.

    Args:
        seed: The same gives the same draws on the same device, for logits of the same size. What they are on a GPU may
            depend on its model, and on the version of this package.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator: torch.Generator | None = None  # made where the first draw is: it cannot be sent
        self._last = -1  # how often it has drawn, from -1
        self._drawn: Tensor | None = None

    def draw(self, number: int, size: int, device: torch.device) -> Float[Tensor, " vocab"]:
        """One of the draws, which must not be written to.

        Args:
            number: Which, from 0; quick for the last one or the next.
            size: Numbers of a draw.
            device: Where they are drawn.
        """
        # On a CPU nothing is gained, and draws of several steps at once are others.
        at_once = 1 if device.type == "cpu" else max(1, min(_STEPS, _NUMBERS // size))
        wanted, place = divmod(number, at_once)
        if self._generator is None or wanted < self._last:
            self._generator, self._last = torch.Generator(device).manual_seed(self._seed), -1
        while self._drawn is None or self._last < wanted:
            empty = torch.empty(at_once, size, dtype=torch.float32, device=device)
            self._drawn, self._last = empty.exponential_(generator=self._generator), self._last + 1
        return self._drawn[place]


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
        self.budgets = dict(enumerate(budgets))
        self.rows = [Noise(seed) for seed in sampling.seeds or ()]
        self.steps = 0

    @property
    def acts(self) -> bool:
        """Whether it changes logits at all."""
        return bool(self.rows or self.budgets)

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
        noisy = self._noisy(logits) if self.rows else logits
        self.steps += 1
        if not self.budgets:
            return noisy
        assert newest is not None
        for row, token in enumerate(newest.tolist() if self.steps > 1 else ()):
            self.budgets[row].take(token)
        return forcing(noisy, self.budgets)

    def _noisy(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
        self.device = self.device or logits.device
        wide = logits.to(self.device).float()
        noise = torch.stack([row.draw(self.steps, wide.shape[1], wide.device) for row in self.rows])
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
        noise = torch.stack([draws[row].next(logits.shape[1], logits.device) for row in rows])
        where: Any = slice(None)
        if rows != list(range(len(logits))):
            where = torch.tensor(rows).to(logits.device, non_blocking=True)
        logits[where] = noisy_logits(logits[where].float(), noise, temperature, top_p).to(logits.dtype)
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
    return brought(chosen, lengths)


def brought(values: Sequence[Float[Tensor, " some"]], lengths: Sequence[int]) -> tuple[Float[Tensor, " tokens"], ...]:
    """Values of rows, one row behind another: each row's on the CPU, for which a device is waited for once."""
    if not values:
        return ()
    together: Sequence[Tensor] = torch.cat(list(values)).cpu().split(list(lengths))  # type: ignore[no-untyped-call]
    return tuple(part.clone() for part in together)


def continued_logprobs(
    continued: Sequence[tuple[Float[Tensor, "1 vocab"], Float[Tensor, "width vocab"], Sequence[int]]],
) -> Float[Tensor, " tokens"]:
    """The same for responses that follow prompts computed before, where the logits are.

    Args:
        continued: For each response the logits at its prompt's last token; those at its own tokens, of which the last
            is not needed; and its ids, at least one.

    Returns:
        float32 [tokens of all of them], one response behind another.
    """
    device = continued[0][1].device
    ids = torch.tensor([token for _, _, response in continued for token in response])
    lengths = [len(response) for _, _, response in continued]
    targets: Sequence[Tensor] = ids.to(device, non_blocking=True).split(lengths)  # type: ignore[no-untyped-call]
    return torch.cat(
        [
            chosen_logprobs(torch.cat([before.to(device), logits[: len(own) - 1]]), own)
            for (before, logits, _), own in zip(continued, targets, strict=True)
        ]
    )


def chosen_logprobs(logits: Float[Tensor, "tokens vocab"], ids: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """Log-probability of each id, where the logits are, for which a device need not be waited for."""
    wide = logits.float()
    return wide.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - wide.logsumexp(dim=-1)
