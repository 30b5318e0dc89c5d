"""`Readout`: the end of a model, its final norm and its unembedding, and what it reads in a residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from persona_lens.backend.blocks import ModuleBackend, find_blocks, module_of
from persona_lens.backend.protocol import Backend
from persona_lens.backend.writing import residual_of
from persona_lens.core.errors import PersonaLensError, first_line

# Any tokens will do, but not one alone: the embedding of one that pads is often zero, and the norm of that is too.
PROBE = list(range(8))
VOCABULARY_CHUNK = 4096  # rows of the unembedding that are in float32 at once


class ReadoutError(PersonaLensError):
    """A model whose end is not one norm and an unembedding whose weights are in reach."""


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm whose scale is held where it is, which makes it a linear map: centre, multiply by the gain, divide.

    Attributes:
        gain: float32 [d_model].
        centred: Whether it takes the mean out (LayerNorm) or not (RMSNorm).
    """

    gain: Float[Tensor, " d_model"]
    centred: bool

    def __call__(self, h: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        """What a change of the residual becomes at a scale of 1: float32 [..., d_model]."""
        changed: Tensor = self._centre(h) * self.gain
        return changed

    def scale(self, h: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any"]:
        """What the norm divides a residual by, its small constant left out: float32 [...]."""
        length: Tensor = self._centre(h).square().mean(dim=-1).sqrt()
        return length

    def normed(self, h: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        """What the norm makes of residuals, each at its own scale; a bias and its small constant left out: float32."""
        made: Tensor = self(h) / self.scale(h).clamp(min=1e-12).unsqueeze(-1)
        return made

    def _centre(self, h: Tensor) -> Tensor:
        h = h.float()
        return h - h.mean(dim=-1, keepdim=True) if self.centred else h

    @staticmethod
    def of(norm: nn.Module, d_model: int) -> FrozenNorm:
        """Measure a LayerNorm or an RMSNorm, however it stores its gain (Gemma's has 1 added to it).

        A vector of plus and minus ones has mean 0 and scale 1: the norm returns its gain. One of ones is left of by
        nothing where the mean is taken out.
        """
        like = next(norm.parameters(), torch.empty(0))
        signs = torch.ones(1, 1, d_model)
        signs[..., 1::2] = -1
        ones = torch.ones(1, 1, d_model)
        probes = torch.cat([signs, -signs, ones, -ones], dim=1).to(like.device, like.dtype)
        with torch.inference_mode():
            plus, minus, up, down = residual_of(norm(probes))[0].float().cpu().clone()
        gain = (plus - minus) / 2 * signs[0, 0]
        centred = bool((up - down).norm() < 1e-2 * (plus - minus).norm())
        return FrozenNorm(gain, centred)


@dataclass(frozen=True, eq=False)
class Readout:
    """The final norm and the unembedding.

    Attributes:
        norm: The final norm; None where there is none.
        unembedding: [vocabulary, d_model], in the model's precision and where the model has it.
    """

    norm: FrozenNorm | None
    unembedding: Float[Tensor, "vocabulary d_model"]

    @property
    def vocabulary(self) -> int:
        """Rows of the unembedding."""
        return len(self.unembedding)

    def shifts(self, directions: Float[Tensor, "k d_model"], scale: float) -> Float[Tensor, "k vocabulary"]:
        """How far adding each direction to the last residual moves each logit, with the norm's scale held: float32.

        Args:
            directions: Not normalised.
            scale: What the norm divides by.
        """
        changed = directions.float() if self.norm is None else self.norm(directions) / scale
        return torch.cat([part for _, part in self._logits(changed, len(self.unembedding))], dim=1).cpu()

    def extremes(self, states: Float[Tensor, "k d_model"], count: int, known: int) -> Extremes:
        """The tokens whose logits are highest and lowest, without ever holding all logits.

        Args:
            states: Behind the norm, see `FrozenNorm.normed`.
            count: How many tokens on either side.
            known: How many of the rows stand for tokens: unembeddings are often padded.
        """
        total, ends = torch.zeros(len(states), device=self.unembedding.device), []
        for start, logits in self._logits(states, known):
            total += logits.sum(dim=1)
            of_part = [logits.topk(min(count, logits.shape[1]), largest=largest) for largest in (True, False)]
            ends.append([(values, ids + start) for values, ids in of_part])
        found = []
        for side, largest in enumerate((True, False)):
            values, ids = (torch.cat([each[side][part] for each in ends], dim=1) for part in (0, 1))
            best, places = values.topk(min(count, values.shape[1]), largest=largest)
            found.append((best.cpu(), ids.gather(1, places).cpu()))
        (high, highest), (_, lowest) = found
        return Extremes(highest, lowest, high[:, 0] - (total / min(known, len(self.unembedding))).cpu())

    def mean_rows(self, ids: Int[Tensor, "k tokens"]) -> Float[Tensor, "k d_model"]:
        """The mean of the unembedding's rows of each set of tokens: the direction of their mean logit. float32."""
        weight = self.unembedding.detach()
        return torch.stack([weight[each.to(weight.device)].float().mean(dim=0).cpu() for each in ids])

    def _logits(self, states: Tensor, known: int) -> Iterator[tuple[int, Float[Tensor, "k part"]]]:
        """Logits of the first tokens, part by part of the vocabulary, each with the id that it begins with."""
        weight = self.unembedding.detach()[:known]
        states = states.float().to(weight.device)
        for start in range(0, len(weight), VOCABULARY_CHUNK):
            yield start, states @ weight[start : start + VOCABULARY_CHUNK].float().T


@dataclass(frozen=True, eq=False)
class Extremes:
    """Which logits of some states are highest and lowest.

    Attributes:
        highest: Ids of tokens, the highest logit first.
        lowest: Likewise.
        rise: The highest logit minus the mean over the vocabulary, which moves no probability: float32.
    """

    highest: Int[Tensor, "k tokens"]
    lowest: Int[Tensor, "k tokens"]
    rise: Float[Tensor, " k"]


def answering_readout(backend: Backend) -> Callable[..., Any]:
    """A function that takes the name of an attribute or method of the model's `Readout`, and what it is called with.

    Of a model in Ray workers one of them answers, so that a run gives the same with them and without.

    Raises:
        ModuleError: If the weights are out of reach.
        ReadoutError: If the model ends otherwise than with one norm and an unembedding.
    """
    over = getattr(backend, "over", None)
    if over is not None and not isinstance(backend, ModuleBackend):
        return cast(Callable[..., Any], over(_answering))
    return _answering(backend)


def _answering(backend: Backend) -> Callable[..., Any]:
    readout = find_readout(module_of(backend))

    def answer(name: str, *given: Any) -> Any:
        with torch.inference_mode():
            return getattr(readout, name)(*given) if given else getattr(readout, name)

    return answer


def find_readout(module: Any) -> Readout:
    """The end of a Hugging Face causal language model.

    Raises:
        ReadoutError: If it has no unembedding, or something other than one norm stands before it.
    """
    path, blocks = find_blocks(module)
    head: Any = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    weights = [] if head is None else [p for p in head.parameters() if p.ndim == 2 and not p.is_meta]
    if not weights or not weights[0].is_floating_point():
        raise ReadoutError(f"no unembedding with weights in reach was found in {type(module).__name__}")
    around = module.get_submodule(path.rpartition(".")[0])
    candidates = [each for each in around.children() if each is not blocks]
    try:
        norm, d_model = _norm_before(head, blocks[-1], candidates, module)
    except ReadoutError:
        raise
    except Exception as error:  # of models' own code
        raise ReadoutError(f"the end of {type(module).__name__} cannot be found: {first_line(error)}") from error
    if weights[0].shape[1] != d_model:
        raise ReadoutError(f"the unembedding of {type(module).__name__} does not take a residual of {d_model}")
    return Readout(None if norm is None else FrozenNorm.of(norm, d_model), weights[0])


def _norm_before(
    head: nn.Module, last: nn.Module, candidates: Sequence[nn.Module], module: nn.Module
) -> tuple[nn.Module | None, int]:
    """Which of the candidates stands between the last block and the unembedding, and the width; None for nothing."""
    seen: dict[Any, Any] = {}

    def keep(name: Any) -> Any:
        return lambda *given: seen.__setitem__(name, residual_of(given[-1]))

    with ExitStack() as stack:
        for handle in (
            head.register_forward_pre_hook(keep("head")),
            last.register_forward_hook(keep("last")),
            *(each.register_forward_hook(keep(number)) for number, each in enumerate(candidates)),
        ):
            stack.callback(handle.remove)
        run(module, PROBE)
    d_model: int = seen["last"].shape[-1]
    if torch.equal(seen["head"], seen["last"]):
        return None, d_model
    outputs = {number: seen.get(number) for number in range(len(candidates))}
    norms = [n for n, value in outputs.items() if isinstance(value, Tensor) and torch.equal(value, seen["head"])]
    if not norms:
        raise ReadoutError(
            f"in {type(module).__name__} something other than one norm stands between the last block and the "
            "unembedding, so the lens cannot be given"
        )
    return candidates[norms[-1]], d_model


def run(module: nn.Module, ids: list[int]) -> None:
    """One forward pass over one row, for what hooks see on the way; nothing about the module is changed."""
    from persona_lens.backend.hooked import evaluating  # which loads transformers

    device = next(module.parameters()).device
    with torch.inference_mode(), evaluating(module):
        module(input_ids=torch.tensor([ids], device=device), use_cache=False)
