"""The logit lens of vectors: which tokens they promote and suppress through the unembedding."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_lens.analysis import AnalysisError
from persona_lens.backend import Backend, Read, ReadKind, TokenBatch
from persona_lens.backend.batches import forward_batches
from persona_lens.backend.blocks import find_blocks, module_of
from persona_lens.backend.hooked import evaluating
from persona_lens.backend.writing import residual_of
from persona_lens.core.documents import Record
from persona_lens.models.chat import chat_format
from persona_lens.reports.result import Result
from persona_lens.vectors import DEFAULT_REDUCTION, PersonaVectors, random_directions

# Any tokens will do, but not one alone: the embedding of one that pads is often zero, and the norm of that is too.
PROBE = list(range(8))
VOCABULARY_CHUNK = 16384  # rows of the unembedding that are in float32 at once


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

    def shifts(self, directions: Float[Tensor, "k d_model"], scale: float) -> Float[Tensor, "k vocabulary"]:
        """How far adding each direction to the last residual moves each logit, with the norm's scale held: float32.

        Args:
            directions: Not normalised.
            scale: What the norm divides by.
        """
        changed = directions.float() if self.norm is None else self.norm(directions) / scale
        changed = changed.to(self.unembedding.device)
        weight = self.unembedding.detach()
        starts = range(0, len(weight), VOCABULARY_CHUNK)
        parts = [changed @ weight[start : start + VOCABULARY_CHUNK].float().T for start in starts]
        return torch.cat(parts, dim=1).cpu()


def find_readout(module: Any) -> Readout:
    """The end of a Hugging Face causal language model.

    Raises:
        AnalysisError: If it has no unembedding, or something other than one norm stands before it.
    """
    path, blocks = find_blocks(module)
    head: Any = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    weight = None if head is None else next((p for p in head.parameters() if p.ndim == 2 and not p.is_meta), None)
    if weight is None:
        raise AnalysisError(f"no unembedding with weights in reach was found in {type(module).__name__}")
    around = module.get_submodule(path.rpartition(".")[0])
    candidates = [each for each in around.children() if each is not blocks]
    seen: dict[Any, Any] = {}

    def keep(name: Any) -> Any:
        return lambda *given: seen.__setitem__(name, residual_of(given[-1]))

    with ExitStack() as stack:
        for handle in (
            head.register_forward_pre_hook(keep("head")),
            blocks[-1].register_forward_hook(keep("last")),
            *(each.register_forward_hook(keep(number)) for number, each in enumerate(candidates)),
        ):
            stack.callback(handle.remove)
        run(module, PROBE)
    if torch.equal(seen["head"], seen["last"]):
        return Readout(None, weight)
    outputs = {number: seen.get(number) for number in range(len(candidates))}
    norms = [n for n, value in outputs.items() if isinstance(value, Tensor) and torch.equal(value, seen["head"])]
    if not norms:
        raise AnalysisError(
            f"in {type(module).__name__} something other than one norm stands between the last block and the "
            "unembedding, so the lens cannot be given"
        )
    return Readout(FrozenNorm.of(candidates[norms[-1]], seen["last"].shape[-1]), weight)


def run(module: nn.Module, ids: list[int]) -> None:
    """One forward pass over one row, for what hooks see on the way; nothing about the module is changed."""
    device = next(module.parameters()).device
    with torch.inference_mode(), evaluating(module):
        module(input_ids=torch.tensor([ids], device=device), use_cache=False)


RANDOM_DIRECTIONS = 20
PROMPTS = 8  # of the trait's questions, for the scale of the final norm


@dataclass(frozen=True)
class TokenShift:
    """A token and how far its logit moves.

    Attributes:
        id: Token id.
        text: What it stands for.
        shift: Change of the logit, minus the mean change over the vocabulary, which moves no probability.
    """

    id: int
    text: str
    shift: float


@dataclass(frozen=True)
class LensLayer:
    """What the vector of one layer says.

    Attributes:
        layer: Block index, 0-based.
        norm: Length of the vector.
        promoted: The tokens whose logits rise most, the first one most.
        suppressed: Those whose logits fall most.
        random_most: The largest rise of any token under random directions as long as the vector: the mean over
            `RANDOM_DIRECTIONS`.
        random_limit: The largest rise under any of them.
    """

    layer: int
    norm: float
    promoted: tuple[TokenShift, ...]
    suppressed: tuple[TokenShift, ...]
    random_most: float
    random_limit: float


@dataclass(frozen=True, repr=False)
class LogitLens(Record, Result):
    """The lens of a trait's vectors (the direct path only).

    A shift is what adding the raw vector once to the residual after the last block does to a logit:
    ``W_U (gain * v) / scale``, with v centred first where the final norm is a LayerNorm. The scale of the norm is held
    at its mean over the given prompts, so the lens is linear in the vector; factors and soft caps that a model applies
    to its logits afterwards are left out. For an earlier layer it is what the vector would do if no block in between
    changed it or answered to it.

    Attributes:
        trait: Name of the trait.
        reduction: Which of the vectors.
        scale: What the final norm divides by; 1 where there is none.
        layers: Layer by layer.
    """

    trait: str
    reduction: str
    scale: float
    layers: tuple[LensLayer, ...]

    kind = "lens"
    folder = None

    @property
    def summary(self) -> dict[str, Any]:  # type: ignore[override]  # made when it is asked for
        """See `persona_lens.reports.result.Result`."""
        return self.to_json()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One a layer and token."""
        return [
            {"layer": each.layer, "side": side, **asdict(token)}
            for each in self.layers
            for side, tokens in (("promoted", each.promoted), ("suppressed", each.suppressed))
            for token in tokens
        ]


def lens(
    backend: Backend,
    vectors: PersonaVectors,
    layers: Sequence[int] | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    top: int = 10,
    reduction: str = DEFAULT_REDUCTION,
    seed: int = 0,
) -> LogitLens:
    """What vectors promote and suppress through the final norm and the unembedding.

    Args:
        backend: The model, in this process.
        vectors: Of this model.
        layers: Which layers' vectors; None for all.
        prompts: Token ids of prompts; at their last tokens the scale of the final norm is taken. By default those of
            the trait's first evaluation questions.
        top: How many tokens on either side.
        reduction: Which of the vectors.
        seed: Of the random directions.

    Raises:
        AnalysisError: If there are no layers or prompts, or the model has no readout of a usual kind.
        ModuleError: If the weights are out of reach.
        VectorsError: If the vectors belong to another model, or a layer has none.
    """
    vectors.check_model(backend, allowable=False)
    layers = range(vectors.model.n_layers) if layers is None else layers
    if prompts is None:
        chat, questions = chat_format(backend), vectors.trait_definition.evaluation_questions[:PROMPTS]
        prompts = [chat.encode(None, question) for question in questions]
    if not layers or not prompts or top < 1:
        raise AnalysisError("the lens needs at least one layer, one prompt and one token to show")
    rows = torch.stack([vectors.vector(layer, reduction) for layer in layers])
    readout = find_readout(module_of(backend))
    scale = _scale(backend, readout, prompts)
    shifts = _centred(readout.shifts(rows, scale))
    units = random_directions(rows.shape[1], RANDOM_DIRECTIONS, seed)
    largest = _centred(readout.shifts(units, scale)).amax(dim=1)
    found = []
    for layer, row, shift in zip(layers, rows, shifts, strict=True):
        norm = float(row.norm())
        promoted, suppressed = (_tokens(backend, shift, top, largest=side) for side in (True, False))
        most, limit = float(largest.mean()) * norm, float(largest.max()) * norm
        found.append(LensLayer(layer, norm, promoted, suppressed, most, limit))
    return LogitLens(vectors.trait, reduction, scale, tuple(found))


def _scale(backend: Backend, readout: Readout, prompts: Sequence[Sequence[int]]) -> float:
    """Mean of what the final norm divides by, at the last tokens of prompts."""
    if readout.norm is None:
        return 1.0
    read = Read(ReadKind.PROMPT_LAST, (backend.info.n_layers - 1,))
    last = [
        result.reads[read.kind.value][:, 0] for _, result in forward_batches(backend, TokenBatch.of(prompts), [read])
    ]
    return float(readout.norm.scale(torch.cat(last)).mean())


def _centred(shifts: Float[Tensor, "k vocabulary"]) -> Float[Tensor, "k vocabulary"]:
    centred: Tensor = shifts - shifts.mean(dim=1, keepdim=True)
    return centred


def _tokens(
    backend: Backend, shift: Float[Tensor, " vocabulary"], top: int, *, largest: bool
) -> tuple[TokenShift, ...]:
    known = min(len(backend.tokenizer), len(shift))  # unembeddings are often padded
    values, ids = shift[:known].topk(min(top, known), largest=largest)
    return tuple(
        TokenShift(token, str(backend.tokenizer.decode([token])), value)
        for token, value in zip(ids.tolist(), values.tolist(), strict=True)
    )
