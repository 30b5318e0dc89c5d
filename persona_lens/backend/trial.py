"""`Trial`: a few calls whose results are known beforehand if edits act, and what each of them found.

Nothing has to be known of the model. Of two texts that differ in their last token alone, all residuals before it are
the same; so the difference of their last residuals at a layer, added to the one text's, must turn it into the other: in
what is read at every later layer, and in the next-token distribution. One row that goes to and fro between the texts,
with an edit at every layer, tries all layers at once. At the last layer, behind which tokens no longer meet, the same
holds of any two texts, which tells whether it is the last. And a residual of which nothing is left beside a multiple of
another text's must give, at every step of a generation, the token that follows that text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from math import inf, nan
from random import Random
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.backend.batches import context_length
from persona_lens.backend.blocks import ModuleBackend, text_config
from persona_lens.backend.differences import Point
from persona_lens.backend.edits import Edit
from persona_lens.backend.protocol import Backend, ForwardResult, Generation, RemoteBackend
from persona_lens.backend.reads import Read, ReadKind
from persona_lens.backend.streaming import Watch, WatchableBackend
from persona_lens.backend.tokens import Positions, Sampling, Span, TokenBatch, TokenIds

NEW = 2  # tokens of a response: one that the prompt gives, and one that is generated after it
SHORT, LONG = 3, 40  # tokens that texts begin with; an engine keeps beginnings in blocks of 16 or 32
REST = 2 + NEW + 2 + NEW  # tokens behind that in the longer second turn: the text's end, a response, a message, another
BLOCK = 16  # of them that are kept for certain, where any are
LAST = Span(Positions.PROMPT, -1)
FAR, NEAR = 1000.0, 100.0  # times a residual: little counts beside it
LARGEST = 2e4  # entry of a residual in float16, with room for what a norm makes of it
MOST_NUMBERS = 2**20  # that a request is to bring back
CHAIN, A, B, B_FOR_OTHER, OTHER, SWAPPED = range(6)  # rows of the forward pass
GENERATING, WATCHED = "generating", "generating and watched"
STEERED, PLAIN, OTHER_PLAIN, EARLIER, OTHER_STEERED = range(5)  # rows of the second turn


@dataclass(frozen=True)
class Tolerance:
    """What is allowed.

    Attributes:
        error: Of a change, relative to the change that was to be.
        least: Nats by which two next-token distributions must differ to tell anything.
        felt: Share of a response's residual that a strong edit of what stands before it changes, at least.
        wide: Whether residuals may be a thousand times as long as they are.
    """

    error: float
    least: float
    felt: float
    wide: bool = True


class Undecided(Exception):  # noqa: N818 - nothing is known to be wrong
    """The model goes on alike from these texts, so that nothing can be told from them."""


@dataclass(frozen=True)
class Texts:
    """What a trial runs over.

    Attributes:
        ends: Texts that differ in their last token alone.
        other: Another text, of another length.
        turn: What stands before a second turn's response, after that of the first.
    """

    ends: tuple[TokenIds, TokenIds, TokenIds]
    other: TokenIds
    turn: TokenIds

    @staticmethod
    def of(backend: Backend, beginning: str, ends: Sequence[str], other: str, turn: str) -> Texts:
        """Encode them, as long as the backend's caches want them."""
        encode, length = backend.tokenizer.encode, _length(backend)
        head = tuple(islice(cycle(encode(beginning)), length))
        last = [tuple(encode(end, add_special_tokens=False)[-1:]) for end in ends]
        rest = tuple(islice(cycle(encode(other)), length + 2))
        after = tuple(encode(turn, add_special_tokens=False)[:2])
        return Texts((head + last[0], head + last[1], head + last[2]), rest, after)

    @staticmethod
    def drawn(backend: Backend, count: int) -> Iterator[Texts]:
        """So many of tokens drawn from the vocabulary, whatever they say; none where it is a single one."""
        tokenizer, length, random = backend.tokenizer, _length(backend), Random(0)
        ids = sorted({*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids, *backend.end_ids})
        for _ in range(count if len(ids) > 1 else 0):
            head, rest, after = (tuple(random.choices(ids, k=k)) for k in (length, length + 2, 2))
            last = [(each,) for each in islice(cycle(random.sample(ids, min(3, len(ids)))), 3)]
            yield Texts((head + last[0], head + last[1], head + last[2]), rest, after)


def _length(backend: Backend) -> int:
    """Tokens that texts begin with, as many as the backend's caches want and its context has room for."""
    alone = isinstance(backend, ModuleBackend | RemoteBackend)  # which keep nothing of a call
    wanted, limit = SHORT if alone else LONG, context_length(backend)
    return wanted if limit is None else min(wanted, limit - REST)


class FailingEdit(Edit):
    """An edit that raises once the model has reached its layer, wherever that runs."""

    def plain(self) -> dict[str, Any]:
        """See `Edit.plain`; of an operation that there is not."""
        return {**super().plain(), "operation": "raise on purpose, to see what is left"}


class Trial:
    """The calls over some texts, and what they found.

    Attributes:
        found: What was tried so far.

    Args:
        backend: The model.
        texts: The texts.
        tolerance: What is allowed.
    """

    def __init__(self, backend: Backend, texts: Texts, tolerance: Tolerance) -> None:
        self.backend, self.texts, self.tolerance = backend, texts, tolerance
        self.costly = isinstance(backend, RemoteBackend)  # every call is a request that waits in a queue
        self.last = backend.info.n_layers - 1
        self.layers = tuple(range(self.last + 1))
        if self.costly:  # and brings back no more than so much
            most = max(2, MOST_NUMBERS // (6 * backend.info.d_model))
            self.layers = tuple(sorted({*self.layers[:: -(-len(self.layers) // (most - 1))], self.last}))
        self.chain = (self.last,) if _counts_tokens_later(backend) else self.layers
        self.middle = max([0, *(layer for layer in self.layers if layer < self.last and 2 * layer <= self.last + 1)])
        self.found: list[Point] = []
        self._finished: tuple[Sequence[TokenIds], ForwardResult] | None = None

    def points(self) -> list[Point]:
        """What was tried, in the order in which it was.

        Raises:
            Undecided: If nothing can be told from these texts.
        """
        before = self._try_layers()
        self._try_failing(before)
        self._try_generating(GENERATING)
        if isinstance(self.backend, WatchableBackend) and not self.costly:
            self._try_generating(WATCHED)
        return self.found

    @cached_property
    def plain(self) -> Generation:
        """What follows the three ends and the other text without edits."""
        prompts = [*self.texts.ends, self.texts.other]
        return self.backend.generate(prompts, Sampling(NEW), (), [Read(ReadKind.PROMPT_LAST, self.layers)])

    @cached_property
    def residuals(self) -> Float[Tensor, "texts layers d_model"]:
        """At the last token of each, at the layers that are tried."""
        return self.plain.reads["prompt_last"]

    def step(self, layer: int, to: int = 1, of: int = 0) -> Float[Tensor, " d_model"]:
        """What is between the last residuals of two texts at a layer."""
        at = self.layers.index(layer)
        return self.residuals[to, at] - self.residuals[of, at]

    def next_token(self, text: int) -> int:
        """The token that follows a text; of several that end a turn the first."""
        response = self.plain.responses[text]
        return response[0] if response else self.backend.end_ids[0]

    def _add(self, name: str, values: tuple[float, float, str], error: float, detail: str = "") -> None:
        self.found.append(Point(name, *values, error, self.tolerance.error, detail))

    # Every layer, in one forward pass

    @cached_property
    def _path(self) -> list[int]:
        """Which of the three ends the chain's row is to be at each layer: never the same twice, and B at the last."""
        path = [1 if (len(self.chain) - 1 - number) % 2 == 0 else 0 for number in range(len(self.chain))]
        return path if path[0] else [2, *path[1:]]  # it is A before the first

    def _try_layers(self) -> ForwardResult:
        """Run the pass; what it found is handed on."""
        a, b, _ = self.texts.ends
        first, other = (self.next_token(0),), (self.next_token(3),)
        tokens = TokenBatch.of([a, a, b, b, self.texts.other, self.texts.other], [first] * 3 + [other] * 3)
        pairs = zip(self.chain, self._path, [0, *self._path], strict=False)
        edits = [Edit.add(layer, self.step(layer, to, of), _rows(6, CHAIN), LAST) for layer, to, of in pairs]
        edits.append(Edit.add(self.last, self.step(self.last, 1, 3), _rows(6, SWAPPED), LAST))
        found = self.backend.forward(tokens, edits, [Read(ReadKind.PROMPT_LAST, self.layers)], logprobs=True)
        surprise, reads = _next_token(found), found.reads["prompt_last"]
        if min(abs(surprise[A] - surprise[B]), abs(surprise[OTHER] - surprise[B_FOR_OTHER])) < self.tolerance.least:
            raise Undecided
        what = "edits at every layer" if len(self.chain) == len(self.layers) else "edits at the last layer"
        self._add_reads(what, reads[CHAIN], torch.stack([edit.direction for edit in edits[:-1]]))
        self._add_surprise(f"{what} reach the next token", surprise, CHAIN, A, B)
        name = "an edit at the last layer reaches the next token, and no other layer comes behind it"
        self._add_surprise(name, surprise, SWAPPED, OTHER, B_FOR_OTHER)
        self._add_stays("rows beside steered ones stay", reads[[A, B, B_FOR_OTHER, OTHER]], [0, 1, 1, 3])
        return found

    def _add_reads(self, what: str, found: Float[Tensor, "layers d_model"], steps: Float[Tensor, "k d_model"]) -> None:
        """Of the chain's row: what is read at each of its layers, behind the edits."""
        at = [self.layers.index(layer) for layer in self.chain]
        found, wanted, length = found[at], self.residuals[self._path, at], steps.norm(dim=-1)
        errors = (found - wanted).norm(dim=-1) / length
        worst = int(errors.nan_to_num(nan=inf).argmax())
        moved = float((found - wanted + steps)[worst] @ steps[worst] / length[worst])
        values = float(length[worst]), moved, "residual units"
        detail = f"at layer {self.chain[worst]}, the worst of {len(self.chain)}"
        self._add(f"{what} are read there, and behind them", values, float(errors[worst]), detail)

    def _add_surprise(self, name: str, surprise: Tensor, row: int, without: int, wanted: int) -> None:
        plain, expected, measured = (float(surprise[each]) for each in (without, wanted, row))
        error = abs(measured - expected) / abs(expected - plain)
        self._add(name, (expected, measured, "nats"), error, f"{plain:.4g} without edits")

    def _add_stays(self, name: str, found: Float[Tensor, "rows layers d_model"], texts: Sequence[int]) -> None:
        """That residuals are those of texts without edits."""
        length = (self.residuals[1] - self.residuals[0]).norm(dim=-1)
        error = float(((found - self.residuals[list(texts)]).norm(dim=-1) / length).max())
        self._add(name, (0.0, error, "of the way from text to text"), error)

    # What an edit that fails leaves behind

    def _try_failing(self, before: ForwardResult) -> None:
        a, step = self.texts.ends[0], self.step(0)
        failing: Edit = Edit.add(self.last + 1, step)  # which is known before anything is sent
        if not self.backend.info.remote:
            failing = FailingEdit(min(1, self.last), step, coefficient=1.0)
        edits, read = [Edit.add(0, step), failing], Read(ReadKind.PROMPT_LAST, self.layers)
        first, raised = TokenBatch.of([a], [(self.next_token(0),)]), 0
        for call in (
            lambda: self.backend.forward(first, edits, [read], logprobs=True),
            lambda: self.backend.generate([a], Sampling(1), edits, [read]),
        ):
            try:
                call()
            except Exception:  # noqa: BLE001 - libraries wrap what is raised inside them in errors of their own
                raised += 1
        self._add("an edit that cannot be made is an error", (2.0, float(raised), "errors"), float(2 - raised))
        if self.costly:
            return
        found = self.backend.forward(first, (), [read], logprobs=True)
        surprise = torch.cat([_next_token(found), _next_token(before)[[A, B]]])
        name = "after a call that failed one without edits has none"
        self._add_stays(name + ", reads", found.reads["prompt_last"], [0])
        self._add_surprise(name + ", next token", surprise, 0, 2, 1)

    # A second turn, with what is kept of the first

    def _try_generating(self, way: str) -> None:
        target = next((text for text in (1, 3, 0) if self.plain.responses[text]), None)
        if target is None:
            raise Undecided
        turns = {
            text: (*prompt, *self.plain.responses[text], *self.texts.turn)
            for text, prompt in ((0, self.texts.ends[0]), (3, self.texts.other))
        }
        prompts = [turns[0], turns[0], turns[3], turns[0], turns[3]]
        edits, reads = self._second_turn(target), self._reads_of_turn()
        made = self._generated(way, prompts, edits, reads[: 1 + self.costly])
        token = self.next_token(target)
        plain = [made.responses[row] for row in (PLAIN, OTHER_PLAIN, EARLIER)]
        if not all(plain) or all(set(each) == {token} for each in plain[:2]):
            raise Undecided  # they have nothing to read, or say the same
        steered = [each for row in (STEERED, OTHER_STEERED) for each in made.responses[row]]
        right = sum(each == token for each in steered)
        what = f"{way}, a second turn: every token of every steered row is the one that is known"
        self._add(what, (2.0 * NEW, float(right), "tokens"), float(2 * NEW - right), f"token {token}")
        if self.costly:
            self._add_prompts(way, made)
            return
        if self._finished is None or self._finished[0] != made.responses:
            text = TokenBatch.of(prompts, made.responses)
            self._finished = made.responses, self.backend.forward(text, edits, reads)
        self._add_generated(way, made, self._finished[1])

    def _second_turn(self, target: int) -> list[Edit]:
        """Edits of two rows in the middle and at the end, and in another of how the first turn begins alone."""
        rows, aim = _rows(5, STEERED, OTHER_STEERED), self.residuals[target, -1]
        far = FAR if self.tolerance.wide else min(NEAR, LARGEST / float(aim.abs().max()))
        turn = Span(Positions.PROMPT, 0, min(BLOCK, len(self.texts.ends[0])))
        return [
            Edit.add(0, 4 * self.step(0), _rows(5, EARLIER), turn),
            Edit.add(self.middle, self.step(self.middle), rows),
            Edit.add(self.last, aim, far * rows, Positions.GENERATING),
        ]

    def _reads_of_turn(self) -> list[Read]:
        """Those of responses, which let an engine go on from what it kept; and of prompts, which do not."""
        layers = tuple(sorted({self.middle, min(self.middle + 1, self.last), self.last}))
        return [Read(ReadKind.RESPONSE_MEAN, layers), Read(ReadKind.PROMPT_LAST, (self.middle,))]

    def _generated(
        self, way: str, prompts: Sequence[TokenIds], edits: Sequence[Edit], reads: Sequence[Read]
    ) -> Generation:
        if way == GENERATING:
            return self.backend.generate(prompts, Sampling(NEW), edits, reads)
        watch = Watch(self.step(0)[None], lambda _: None)
        assert isinstance(self.backend, WatchableBackend)
        return self.backend.generate_watched(prompts, Sampling(NEW), watch, edits, reads)

    def _add_prompts(self, way: str, made: Generation) -> None:
        """By how much the edit in the middle moved the last token of prompts."""
        step, found = self.step(self.middle), made.reads["prompt_last"][:, 0]
        moved = found[[STEERED, OTHER_STEERED]] - found[[PLAIN, OTHER_PLAIN]]
        error = float(((moved - step).norm(dim=-1) / step.norm()).max())
        values = float(step.norm()), float((moved @ step).min() / step.norm()), "residual units"
        self._add(f"{way}, a second turn: an edit at layer {self.middle} is read there", values, error)

    def _add_generated(self, way: str, made: Generation, whole: ForwardResult) -> None:
        """Compare what was read on the way with the finished text, at the edit in the middle and behind it."""
        found, wanted = (each.reads["response_mean"] for each in (made, whole))
        before_last = slice(0, max(1, found.shape[1] - 1))  # where nothing counts beside the last edit
        length = (wanted[STEERED] - wanted[PLAIN]).norm(dim=-1)[before_last]
        errors = (found - wanted).norm(dim=-1)[:, before_last] / length
        for which, rows in (("steered", [STEERED, OTHER_STEERED]), ("unsteered", [PLAIN, OTHER_PLAIN])):
            error = float(errors[rows].nan_to_num(nan=inf).max())
            what = f"{way}, a second turn: {which} rows are read as in a forward pass"
            self._add(what, (0.0, error, "of what steering changes"), error)
        if self.last == 0:
            return  # behind whose edits tokens no longer meet
        felt, known = (each[EARLIER, -1] - each[PLAIN, -1] for each in (found, wanted))
        error = float((found[EARLIER, -1] - wanted[EARLIER, -1]).norm() / known.norm())
        expected, measured = (float(each.norm() / wanted[PLAIN, -1].norm()) for each in (known, felt))
        what = f"{way}, a second turn: an edit of how the first begins is felt"
        values, least = (expected, measured, "of a residual"), self.tolerance.felt
        self._add(what, values, error if min(values[:2]) >= least else inf, f"at least {least:g}")


def _counts_tokens_later(backend: Any) -> bool:
    """Whether a layer may know the token itself beside its residual, as those of Gemma 4, each with embeddings, do.

    Two texts that end otherwise are alike then only behind the last layer.
    """
    while (inner := getattr(backend, "hooked", None) or getattr(backend, "inner", None)) is not None:
        backend = inner
    config = getattr(getattr(backend, "module", None), "config", None) or getattr(backend, "_config", None)
    text = None if config is None else text_config(config)
    names = ("hidden_size_per_layer_input", "num_kv_shared_layers")
    return any(bool(getattr(text, name, None)) for name in names)


def _rows(count: int, *chosen: int) -> Float[Tensor, " rows"]:
    """A coefficient for each row: 1 for those chosen."""
    return torch.tensor([float(row in chosen) for row in range(count)])


def _next_token(found: ForwardResult) -> Float[Tensor, " rows"]:
    """Log-probability of each row's response, which is one token."""
    return torch.tensor([float(row[0]) if len(row) else nan for row in found.logprobs or ()])
