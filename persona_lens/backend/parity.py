"""The parity suite: whether a backend keeps the contract, and gives the same numbers as another one.

It knows backends by the contract alone, so it runs over any installed one, and over a user's own model:
``persona-lens backends check MODEL``. The tests of this project run the very same suite.

In float32 reads agree to a relative 1e-4 (on SmolLM2 2.4e-5 at most), and tokens are identical. In 16 bits the order in
which a library adds numbers up shows: reads are held to a looser bound, and the share of rows whose tokens differ is
reported without being an error. A failure in 16 bits has to be tried again in float32 before it is called a fault: on
SmolLM2 the strongest set, edits at chosen positions, exceeds the bound between eager and fused attention (bfloat16
0.26, float16 0.027). The bounds are not wider, since at 0.4 a response's missing last token goes unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from persona_lens.backend.blocks import ModuleBackend, window_of
from persona_lens.backend.differences import (
    Measurement,
    Point,
    forwards_differ,
    reads_differ,
    token_lengths,
    tokens_differ,
)
from persona_lens.backend.edits import Edit, apply_edit
from persona_lens.backend.intervention import aligned_right
from persona_lens.backend.parity_parts import KINDS, kinds_of, part_generated, part_of_text
from persona_lens.backend.protocol import Backend, ForwardResult, Generation
from persona_lens.backend.reads import Read, ReadKind
from persona_lens.backend.single_rows import LongTexts, SingleRowsBackend
from persona_lens.backend.streaming import Watch, WatchableBackend, WatchedTokens
from persona_lens.backend.tokens import Positions, Sampling, TokenBatch, TokenIds, pad_left
from persona_lens.backend.trial import FailingEdit
from persona_lens.core.progress import Progress, no_progress

# Of unlike lengths, so that every batch is padded; the second halves are the responses of the existing text.
TEXTS = (
    ("The weather today is", " fine, and I am going outside."),
    ("Yes", " or no?"),
    ("Tell me in a few words what you would do with a whole day to yourself", " Nothing."),
    ("One two three four", " five six seven eight nine ten"),
)
EVERYTHING = (*Read.means(), Read(ReadKind.ACTIVATIONS))
LONGEST_WINDOW = 1024  # tokens; texts that are longer than a larger window would take minutes


@dataclass(frozen=True)
class Bounds:
    """What is allowed: relative error of a read, and share of rows with other tokens."""

    reads: float
    tokens: float


FULL = Bounds(reads=1e-4, tokens=0.0)
# In 16 bits transformers' own two ways to compute attention, eager and sdpa, lie up to 0.26 apart in bfloat16 on a
# model with outlier channels once it is edited. What these bounds still catch are edits and reads at a wrong place.
HALF = {"float16": Bounds(reads=5e-2, tokens=1.0), "bfloat16": Bounds(reads=4e-1, tokens=1.0)}

Check = tuple[str, float, Callable[[], Measurement]]
"""Name, tolerance, and what carries it out."""


def check_parity(
    backend: Backend,
    reference: Backend | None = None,
    *,
    texts: Sequence[tuple[str, str]] = TEXTS,
    max_new_tokens: int = 8,
    self_checks: bool = True,
    progress: Progress = no_progress,
) -> list[Point]:
    """Check a backend against the contract, and against another backend that runs the same model.

    Args:
        backend: The one to check.
        reference: What it must agree with; None checks only that the backend agrees with itself.
        texts: Prompts and responses to run over, at least two, of different lengths.
        max_new_tokens: Length of the generated responses, in tokens.
        self_checks: Also check that the backend agrees with itself: cached, batched, while generating.
        progress: Told how many checks are done.

    Returns:
        Every check that was made, failed ones included. A check that raises has failed; the others still run.
    """
    bounds = _bounds(backend, reference)
    checks: list[Check] = []
    if reference is not None:
        same = _outcome("the same model", 0.0, lambda: _same_model(backend, reference))
        if not same.passed:
            return [same]
        probe = Probe.of(reference, texts, max_new_tokens)
        checks += _checks_against(backend, reference, probe, bounds)
        outcomes = [same]
    else:
        probe = Probe.of(backend, texts, max_new_tokens)
        outcomes = []
    if self_checks:
        checks += _self_checks(backend, probe, bounds)
    label = f"checking {backend.info.backend.split()[0]}"
    for done, check in enumerate(checks):
        progress(done, len(checks), label)
        outcomes.append(_outcome(*check))
    progress(len(checks), len(checks), label)
    return outcomes


def _outcome(name: str, tolerance: float, measure: Callable[[], Measurement]) -> Point:
    try:
        measured, detail = measure()
    except Exception as error:  # noqa: BLE001 - any failure of a backend is a finding, not the end of the suite
        measured, detail = float("inf"), f"{type(error).__name__}: {error}"
    return Point.apart(name, measured, tolerance, detail)


def _bounds(*backends: Backend | None) -> Bounds:
    # A server does not say what it holds the weights in; it is held to what the other one promises.
    dtypes = {backend.info.dtype for backend in backends if backend is not None and not backend.info.remote}
    if dtypes and dtypes <= {"float32", "float64"}:
        return FULL
    # Of quantised weights only the number format of the arithmetic around them counts, and that is 16 bits.
    half = (HALF.get(dtype, HALF["bfloat16"]) for dtype in dtypes - {"float32", "float64"})
    return max(half, key=lambda bounds: bounds.reads, default=HALF["bfloat16"])


def _same_model(backend: Backend, reference: Backend) -> Measurement:
    differences = backend.info.differences(reference.info)
    return float(len(differences)), "; ".join(differences) or backend.info.architecture


@dataclass(frozen=True)
class Probe:
    """What a suite runs: the same for both backends.

    Attributes:
        prompts: Token ids to generate from.
        text: The prompts with given responses.
        edits: Named sets of edits, strong enough to change the text.
        layer: Where the single edits act.
        direction: Float [d_model], as long as the residual is there.
        new: Length limit of a generation.
        long: Texts that share beginnings, and are longer than the model's window where that is small enough.
    """

    prompts: tuple[TokenIds, ...]
    text: TokenBatch
    edits: Mapping[str, tuple[Edit, ...]]
    layer: int
    direction: Tensor
    new: int
    long: LongTexts

    @staticmethod
    def of(backend: Backend, texts: Sequence[tuple[str, str]], max_new_tokens: int) -> Probe:
        """Encode the texts, and scale the edits to the model."""
        encode = backend.tokenizer.encode
        text = TokenBatch.of([encode(p) for p, _ in texts], [encode(r, add_special_tokens=False) for _, r in texts])
        layer = backend.info.n_layers // 2
        last = backend.forward(text, reads=[Read(ReadKind.PROMPT_LAST)]).reads["prompt_last"]
        contrast = last[0, layer] - last[1, layer]
        # As long at each layer as the residual is there: an edit many times that would make rounding errors grow.
        directions = contrast / contrast.norm() * last.norm(dim=-1).mean(dim=0).unsqueeze(-1)
        # Between the two prompts that make up the contrast: one is above, so that the cap has something to do.
        threshold = float((last[0, layer] + last[1, layer]) / 2 @ contrast / contrast.norm())
        edits = _edit_sets(layer, directions, threshold, len(text))
        window = window_of(backend.module.config) if isinstance(backend, ModuleBackend) else None
        ids = [token for prompt, _ in texts for token in encode(prompt, add_special_tokens=False)]
        long = LongTexts.of(ids, longer_than=window if window is not None and window <= LONGEST_WINDOW else 0)
        return Probe(text.prompts, text, edits, layer, directions[layer], max_new_tokens, long)

    def on_long_texts(self) -> Probe:
        """The same over long texts, of prompts that do not begin alike."""
        return replace(self, prompts=self.long.unlike.prompts, text=self.long.unlike)

    def sampling(self, seeded: bool = False, use_cache: bool = True) -> Sampling:
        """Greedy, or with a seed for each prompt."""
        seeds = tuple(range(11, 11 + len(self.prompts))) if seeded else None
        return Sampling(self.new, 1.0 if seeded else 0.0, 0.9 if seeded else 1.0, seeds, use_cache)


def _edit_sets(layer: int, directions: Tensor, threshold: float, rows: int) -> dict[str, tuple[Edit, ...]]:
    direction, last = directions[layer], len(directions) - 1
    return {
        "no edits": (),
        "add": (Edit.add(layer, direction),),
        "ablate": (Edit.ablate(layer, direction),),
        "cap": (Edit.cap(layer, direction, threshold),),
        "a coefficient for each row": (Edit.add(layer, direction, torch.linspace(-1.0, 1.0, rows)),),
        "edits at chosen positions": (
            Edit.add(0, directions[0], 0.5, Positions.PROMPT),
            Edit.add(layer, direction, -1.0, Positions.RESPONSE),
            Edit.add(last, directions[last], 0.5, Positions.GENERATING),
        ),
    }


def _checks_against(backend: Backend, reference: Backend, probe: Probe, bounds: Bounds) -> Iterator[Check]:
    for name, edits in probe.edits.items():
        yield f"reads at every layer, {name}", bounds.reads, partial(_same_reads, backend, reference, probe, edits)
    for name, edits in probe.edits.items():
        yield f"greedy tokens, {name}", bounds.tokens, partial(_same_tokens, backend, reference, probe, edits)
    sampled = partial(_same_tokens, backend, reference, probe, probe.edits["add"], seeded=True)
    yield "seeded samples", bounds.tokens, sampled


def _self_checks(backend: Backend, probe: Probe, bounds: Bounds) -> Iterator[Check]:
    def reads(name: str, measure: Callable[..., Measurement], *given: Any) -> Check:
        return name, bounds.reads, partial(measure, backend, *given)

    def tokens(name: str, measure: Callable[..., Measurement], *given: Any) -> Check:
        return name, bounds.tokens, partial(measure, backend, *given)

    for name in ("no edits", "add", "edits at chosen positions"):
        what = f"reads while generating equal those of the finished text, {name}"
        yield reads(what, _generating_reads, probe, probe.edits[name])
    if isinstance(backend, WatchableBackend):
        for name in ("no edits", "edits at chosen positions"):
            what = f"projections streamed while generating equal those of the finished text, {name}"
            yield reads(what, _streaming, probe, probe.edits[name])
    for kind in Positions:
        if kind in KINDS:  # of which there may be no token in what a model says by itself
            continue
        what = f"an edit of {kind} tokens changes every one of them in every row, and no other"
        yield reads(what, _placement, probe, kind)
    for kind in kinds_of(backend):
        edit, what = Edit.add(probe.layer, probe.direction, 1.0, kind), f"an edit and a mean of {kind} tokens"
        yield reads(f"{what} are those of a mask made by hand, in text", part_of_text, probe.text, edit)
        generated = f"{what} are those of a mask made by hand, while generating"
        yield reads(generated, part_generated, probe.prompts, probe.sampling(), edit)
    for name, edits in probe.edits.items():
        yield tokens(f"the same tokens without a KV cache, {name}", _uncached, probe, edits)
    for name in ("no edits", "a coefficient for each row"):
        edits = probe.edits[name]
        yield reads(f"batch equals single rows, reads, {name}", _single_reads, probe.text, Read.means(), edits)
        yield tokens(f"batch equals single rows, greedy tokens, {name}", _single_tokens, probe, edits)
    long = probe.on_long_texts()
    for what, means in (("reads of responses", Read.means()[:1]), ("reads", Read.means())):
        yield reads(f"prompts that begin alike equal single rows, {what}", _single_reads, probe.long.alike, means)
    yield reads("long texts equal single rows", _single_reads, long.text, Read.means())
    yield reads("reads while generating equal those of the finished text, long prompts", _generating_reads, long, ())
    yield tokens("the same tokens without a KV cache, long prompts", _uncached, long, ())
    yield tokens("samples do not depend on the batch", _single_tokens, probe, probe.edits["add"], True)
    yield reads("coefficient 0 equals no edit", _zero, probe)
    yield reads("edits are gone after an error", _after_error, probe)


def _forward(backend: Backend, probe: Probe, edits: Sequence[Edit]) -> ForwardResult:
    return backend.forward(probe.text, edits, EVERYTHING, logprobs=True)


def _generate(
    backend: Backend, probe: Probe, edits: Sequence[Edit], seeded: bool = False, use_cache: bool = True
) -> Generation:
    return backend.generate(probe.prompts, probe.sampling(seeded, use_cache), edits)


def _same_reads(backend: Backend, reference: Backend, probe: Probe, edits: Sequence[Edit]) -> Measurement:
    return forwards_differ(_forward(backend, probe, edits), _forward(reference, probe, edits))


def _same_tokens(
    backend: Backend, reference: Backend, probe: Probe, edits: Sequence[Edit], seeded: bool = False
) -> Measurement:
    return tokens_differ(_generate(backend, probe, edits, seeded), _generate(reference, probe, edits, seeded))


def _generating_reads(backend: Backend, probe: Probe, edits: Sequence[Edit]) -> Measurement:
    generated = backend.generate(probe.prompts, probe.sampling(), edits, EVERYTHING)
    text = TokenBatch.of(probe.prompts, generated.responses)
    error, where = reads_differ(generated.reads, backend.forward(text, edits, EVERYTHING).reads)
    ended = sum(generated.ended)
    return error, f"{where}; {len(text) - ended} rows cut at the limit, {ended} ended by the model"


def _streaming(backend: WatchableBackend, probe: Probe, edits: Sequence[Edit]) -> Measurement:
    """Compare what a callback is told with the residuals of the finished text, projected here."""
    passes: list[WatchedTokens] = []
    noise = torch.randn(2, len(probe.direction), generator=torch.Generator().manual_seed(0))
    watch = Watch(torch.cat([probe.direction[None], noise]), passes.append)
    generated = backend.generate_watched(probe.prompts, probe.sampling(), watch, edits)
    text = TokenBatch.of(probe.prompts, generated.responses)
    residual = backend.forward(text, edits, [Read(ReadKind.ACTIVATIONS)]).reads["activations"]
    expected = residual @ watch.read.unit_directions(backend.info.n_layers).mT
    told = joined(passes)
    if [each.step for each in passes] != list(range(len(passes))) or told.shape != expected.shape:
        steps = [each.step for each in passes]
        return float("inf"), f"steps {steps}, shape {list(told.shape)} instead of {list(expected.shape)}"
    # A small projection of a long residual is as exact as the residual is.
    errors = (told - expected).norm(dim=-1) / token_lengths(residual)
    missing = not torch.equal(told.isnan(), expected.isnan())
    return float("inf") if missing else float(errors.nan_to_num().max()), f"{len(passes)} passes"


def joined(passes: Sequence[WatchedTokens]) -> Float[Tensor, "batch layers width k"]:
    """The values of all passes as a read of `PROJECTIONS` brings them: left-padded with NaN."""
    values = torch.cat([each.projections for each in passes], dim=2)
    return aligned_right(values, ~values.isnan().all(dim=-1).all(dim=1))


def _placement(backend: Backend, probe: Probe, kind: Positions) -> Measurement:
    """Compare an edited generation's residuals at the edited layer with what the edit makes of plain ones."""
    edit = Edit.add(probe.layer, probe.direction, 1.0, kind)
    read = Read(ReadKind.ACTIVATIONS, (probe.layer,))
    generated = backend.generate(probe.prompts, probe.sampling(), [edit], [read])
    text = TokenBatch.of(probe.prompts, generated.responses)
    plain = backend.forward(text, (), [read]).reads["activations"]
    # An edit reaches other tokens only through later layers: at its own each token stands for itself.
    expected = apply_edit(plain[:, 0], edit, _mask(text, kind)).unsqueeze(1)
    return reads_differ(generated.reads, {"activations": expected})


def _mask(text: TokenBatch, kind: Positions) -> Tensor:
    tokens = pad_left(text, 0)
    last_prompt = tokens.prompt & ~pad(tokens.prompt[:, 1:], (0, 1))
    return {
        Positions.ALL: tokens.attention,
        Positions.PROMPT: tokens.prompt,
        Positions.RESPONSE: tokens.response,
        Positions.GENERATING: tokens.response | last_prompt,
    }[kind]


def _uncached(backend: Backend, probe: Probe, edits: Sequence[Edit]) -> Measurement:
    return tokens_differ(_generate(backend, probe, edits, use_cache=False), _generate(backend, probe, edits))


def _single_reads(backend: Backend, text: TokenBatch, means: Sequence[Read], edits: Sequence[Edit] = ()) -> Measurement:
    batch = backend.forward(text, edits, means, logprobs=True)
    return forwards_differ(batch, SingleRowsBackend(backend, cached=True).forward(text, edits, means, logprobs=True))


def _single_tokens(backend: Backend, probe: Probe, edits: Sequence[Edit], seeded: bool = False) -> Measurement:
    singles = SingleRowsBackend(backend, cached=True)
    return tokens_differ(_generate(backend, probe, edits, seeded), _generate(singles, probe, edits, seeded))


def _zero(backend: Backend, probe: Probe) -> Measurement:
    zero = Edit.add(probe.layer, probe.direction, 0.0)
    return forwards_differ(_forward(backend, probe, [zero]), _forward(backend, probe, ()))


def _after_error(backend: Backend, probe: Probe) -> Measurement:
    before = _forward(backend, probe, ())
    last = backend.info.n_layers - 1
    edits = [*probe.edits["add"], FailingEdit(last, probe.direction, coefficient=1.0)]
    raised = 0
    for run in (
        lambda: backend.generate(probe.prompts, probe.sampling(), edits, EVERYTHING),
        lambda: backend.forward(probe.text, edits, EVERYTHING, logprobs=True),
    ):
        try:
            run()
        except Exception:  # noqa: BLE001 - libraries wrap what is raised inside them in errors of their own
            raised += 1
    if raised < 2:
        return float("inf"), "an error inside an edit did not come out"
    return forwards_differ(_forward(backend, probe, ()), before)
