"""`Preview`: token by token, which edits change a text and which reads take it in, before anything runs.

The preview holds no rules of its own. It has the `Intervention` that runs beside every model run over a made-up
residual, pass by pass as a generation does, and looks at what was written and what was read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from persona_lens.backend import Backend, Edit, Operation, Positions, Read, ReadKind, TokenBatch, TokenError
from persona_lens.backend.edits import as_edits, check_edits
from persona_lens.backend.intervention import Intervention
from persona_lens.backend.parts.asked import parts_for
from persona_lens.backend.reads import check_reads
from persona_lens.backend.sinks import depend_on_sinks, left_out, sinks_of
from persona_lens.backend.tokens import ID_LIMIT, PaddedTokens, pad_left
from persona_lens.core.documents import Record
from persona_lens.steering.given import GivenEdits, GivenVectors, given_steering
from persona_lens.steering.history import DEFAULT_HISTORY, History, TurnPrompt, turn_edits
from persona_lens.steering.notation import Layers, Term, When
from persona_lens.steering.steering import Steering

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

# Of the tokens to come, so many are shown even if all are treated alike.
FEW = 3
# A factor that is so small a share of its edit's largest is the rounding of a schedule that passes through 0.
NEGLIGIBLE = 1e-6
# What stands for a vector that has no name, in the notation of an edit that was not written in it.
NAMELESS = "vector"


@dataclass(frozen=True)
class PreviewedEdit:
    """One term of a steering, or several edits that differ only in their layers and vectors.

    Attributes:
        text: As it is written.
        layers: Where it edits; empty if other ablations leave nothing of it.
        operation: What it does.
        relative: Whether its factors count norms of the residual.
        condition: What has to be true at a token as well, such as ``evil@12>3``; known only once the model runs.
    """

    text: str
    layers: tuple[int, ...]
    operation: Operation
    relative: bool = False
    condition: str | None = None


@dataclass(frozen=True)
class PreviewedRead:
    """Something that is brought back.

    Attributes:
        kind: A value of `ReadKind`.
        layers: Where it is taken.
    """

    kind: ReadKind
    layers: tuple[int, ...]


@dataclass(frozen=True)
class PreviewedToken:
    """One token and what becomes of it.

    Attributes:
        index: Its number in the row, from 0.
        id: Token id; None for one that is still to be generated.
        text: What it stands for; the name of a special token.
        special: Whether it is one.
        part: ``prompt`` or ``response``.
        factors: For each edit the factor with which it acts here, coefficient and schedule together; 0 where it leaves
            the token as it is.
        reads: For each read whether it takes in this token.
        sink_at: Layers at which it is an attention sink; empty where nothing depends on that.
    """

    index: int
    id: int | None
    text: str
    special: bool
    part: Literal["prompt", "response"]
    factors: tuple[float, ...]
    reads: tuple[bool, ...]
    sink_at: tuple[int, ...] = ()


@dataclass(frozen=True)
class Preview(Record):
    """What will be edited and read. It prints as a table, by `rich` in colour.

    Attributes:
        tokens: The tokens, those to come as far as they are treated in different ways.
        edits: What `PreviewedToken.factors` belong to.
        reads: What `PreviewedToken.reads` belong to.
        rest: How many tokens may follow that are treated as the last one is.
        n_layers: Number of layers of the model.
    """

    tokens: tuple[PreviewedToken, ...]
    edits: tuple[PreviewedEdit, ...]
    reads: tuple[PreviewedRead, ...]
    rest: int
    n_layers: int

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table: Table = Table("token", "id", "text", "part")
        table.columns[0].justify = table.columns[1].justify = "right"
        table.columns[2].overflow = "fold"
        for edit in self.edits:
            table.add_column(Text(f"{edit.text}\n{_where(edit.layers, self.n_layers)}"), overflow="fold")
        if self.reads:
            table.add_column("read by", overflow="fold")
        if self._sinks:
            table.add_column("sink at")
        for token in self.tokens:
            known = "" if token.id is None else str(token.id)
            table.add_row(str(token.index), known, _quoted(token), token.part, *self._of(token))
        if self.rest:
            more = Text(f"{self.rest} more, if it gets so long")
            table.add_row("…", "", more, "response", *self._of(self.tokens[-1]))
        return table

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        text = StringIO()
        Console(file=text, width=120, markup=False, emoji=False).print(self)
        return text.getvalue().rstrip("\n")

    @cached_property
    def _sinks(self) -> bool:
        return any(token.sink_at for token in self.tokens)

    def _of(self, token: PreviewedToken) -> list[Text]:
        """The cells that say what becomes of a token."""
        from rich.text import Text

        cells = [_action(edit, factor) for edit, factor in zip(self.edits, token.factors, strict=True)]
        if self.reads:
            cells.append(", ".join(read.kind for read, taken in zip(self.reads, token.reads, strict=True) if taken))
        if self._sinks:
            cells.append(_where(token.sink_at, self.n_layers) if token.sink_at else "")
        return [Text(cell) for cell in cells]


def preview_tokens(
    backend: Backend,
    prompt: Sequence[int] | TurnPrompt,
    response: Sequence[int] | int = 0,
    *,
    edits: GivenEdits = (),
    vectors: GivenVectors = None,
    reads: Sequence[Read] = (),
    history: History | str = DEFAULT_HISTORY,
) -> Preview:
    """Say what will be edited and read.

    The model does not run, but where something leaves attention sinks out: then it runs once over the tokens that are
    there, unedited, to tell which are sinks. On a server it does not, and the first token alone is taken for one.

    Args:
        backend: The model.
        prompt: Token ids of one prompt, as it is sent; or that of a later turn, with what of it is over.
        response: Token ids of a response that is there already, or how many tokens may be generated.
        edits: What is to be written, each edit for one row: one, several, a steering, or its notation.
        vectors: Those that a notation names.
        reads: What is to be brought back.
        history: What edits do to finished turns, where there are any.

    Raises:
        EditError: If an edit does not fit the model, or one row, or cannot be carried out with such a history.
        ReadError: If a read does not fit the model.
        TokenError: If the prompt is empty, or less than no tokens may be generated.
    """
    if isinstance(response, int) and response < 0:
        raise TokenError(f"a response has 0 tokens or more, got {response}")
    info = backend.info
    turn = prompt if isinstance(prompt, TurnPrompt) else TurnPrompt(tuple(prompt))
    prompt, written = turn.ids, given_steering(edits, vectors)
    plain = as_edits(written)
    known, to_come = ((), response) if isinstance(response, int) else (tuple(response), 0)
    text = TokenBatch.of([prompt], [known])
    check_edits(plain, info.n_layers, info.d_model, 1, len(prompt) + len(known))
    check_reads(reads, info.n_layers, info.d_model)
    parts = list(_parts(written))
    sinks = sinks_of(backend, text, to_come) if depend_on_sinks(plain, reads) else None
    padded = pad_left(text, pad_id=0, parts=parts_for(backend.tokenizer, plain, reads))
    groups = [(group, turn_edits(group[:1], [turn], History(history), [known])) for _, group in parts]
    taken = _taken(padded, to_come, reads, info.n_layers, sinks)
    treatment = list(zip(_factors(padded, to_come, groups, sinks), taken, strict=True))
    shown = len(treatment) - _alike_at_the_end(treatment[len(treatment) - to_come :])
    ids: list[int | None] = [*prompt, *known, *[None] * to_come]
    tokens = tuple(
        PreviewedToken(
            index,
            ids[index],
            *_text(backend.tokenizer, ids[index], index - len(prompt)),
            "prompt" if index < len(prompt) else "response",
            *treatment[index],
            sink_at=() if sinks is None else tuple(sinks[:, index].nonzero().flatten().tolist()),
        )
        for index in range(shown)
    )
    described = tuple(PreviewedRead(read.kind, read.resolved_layers(info.n_layers)) for read in reads)
    return Preview(tokens, tuple(edit for edit, _ in parts), described, len(treatment) - shown, info.n_layers)


def _parts(written: Steering | tuple[Edit, ...]) -> Iterator[tuple[PreviewedEdit, tuple[Edit, ...]]]:
    """The terms of a steering, or edits that are alike, each with its edits."""
    for term, edits in written.by_term() if isinstance(written, Steering) else _by_likeness(written):
        assert term.operation is not None  # settled when the steering was made
        masked = any(isinstance(edit.positions, Tensor) for edit in edits)
        text = f"{term}, at masked tokens" if masked else str(term)
        condition = None if term.when is None else str(term.when)
        layers = tuple(edit.layer for edit in edits)
        yield PreviewedEdit(text, layers, term.operation, term.relative, condition), edits


def _by_likeness(edits: Sequence[Edit]) -> list[tuple[Term, tuple[Edit, ...]]]:
    """Edits that differ only in their layers and vectors, with the notation of steerings for them."""
    alike: dict[str, list[Edit]] = {}
    for edit in edits:
        same = replace(edit, layer=0, direction=torch.ones(1), condition=None)
        alike.setdefault(f"{same.content_hash} {_when(edit)}", []).append(edit)
    return [(_term(group[0]), tuple(group)) for group in alike.values()]


def _when(edit: Edit) -> When | None:
    if (found := edit.condition) is None:
        return None
    return When(NAMELESS, None if found.layer == edit.layer else found.layer, found.threshold, found.above)


def _term(edit: Edit) -> Term:
    """An edit in the notation of steerings, as far as that goes."""
    level = edit.target if edit.threshold is None else edit.threshold
    amount = _rounded(float(edit.coefficient)) if level is None else level
    return Term(
        NAMELESS,
        operation=edit.operation,
        amount=None if edit.operation is not Operation.ADD and level is None and amount == 1 else amount,
        relative=edit.relative,
        positions=Positions.ALL if isinstance(edit.positions, Tensor) else edit.positions,
        sinks=edit.sinks,
        schedule=edit.schedule,
        when=_when(edit),
    )


def _factors(
    text: PaddedTokens,
    to_come: int,
    groups: Sequence[tuple[Sequence[Edit], Sequence[Edit]]],
    sinks: Bool[Tensor, "layers tokens"] | None,
) -> list[tuple[float, ...]]:
    """For every token the factor of each group, found by letting each write 1 times it into an entry of its own.

    The edits of a group differ in nothing that matters here but in the sinks of their layers, so one of them stands for
    all: what it becomes in this turn is beside them. Conditions are left out: they depend on what the model computes.
    """
    entries = torch.eye(len(groups), dtype=torch.float64)
    probes = [
        Edit(0, entry, coefficient=edit.coefficient, positions=edit.positions, schedule=edit.schedule)
        for entry, (_, written) in zip(entries, groups, strict=True)
        for edit in written
    ]
    tokens = text.ids.shape[1] + to_come
    found, _ = _run(text, to_come, torch.zeros(1, tokens, len(groups), dtype=torch.float64), edits=probes)
    largest = torch.tensor([_largest(group[0]) if group else 0.0 for group, _ in groups], dtype=torch.float64)
    rounding = found.abs() < NEGLIGIBLE * torch.maximum(found.abs().amax(dim=1, keepdim=True), largest)
    for number, (group, _) in enumerate(groups):
        if sinks is not None and group:  # left out at all layers of the group
            rounding[0, :, number] |= torch.stack([left_out(edit, sinks) for edit in group]).all(dim=0)
    return [tuple(map(_rounded, token)) for token in found.masked_fill(rounding, 0)[0].tolist()]


def _largest(edit: Edit) -> float:
    """What an edit's schedule comes to where it is strongest, which need not be at any token; 0 where it has none."""
    steepest = 0.0 if edit.schedule is None else max(abs(factor) for _, factor in edit.schedule.points)
    return steepest * float(torch.as_tensor(edit.coefficient).abs().max())


def _rounded(number: float) -> float:
    """A number as it was before it became float32, where 0.3 is 0.30000001."""
    return float(f"{number:.6g}")


def _taken(
    text: PaddedTokens, to_come: int, reads: Sequence[Read], n_layers: int, sinks: Bool[Tensor, "layers tokens"] | None
) -> list[tuple[bool, ...]]:
    """For every token whether each read depends on it, found by the derivative of what is read."""
    length = text.ids.shape[1] + to_come
    h = torch.ones(1, length, 1, requires_grad=True)
    probes = [
        Read(r.kind, directions=torch.ones(1, 1) if r.kind is ReadKind.PROJECTIONS else None, sinks=r.sinks)
        for r in reads
    ]
    _, found = _run(text, to_come, h, reads=probes)
    columns = []
    for read in reads:
        (slope,) = torch.autograd.grad(found[read.kind].sum(), h, retain_graph=True)
        # The mean over no tokens is NaN, and so is its slope.
        among = slope[0, :, 0].nan_to_num().ne(0)
        if sinks is not None and read.leaves_out_sinks:
            among &= ~sinks[list(read.resolved_layers(n_layers))].all(dim=0)
        columns.append(among.tolist())
    return [tuple(column[token] for column in columns) for token in range(length)]


def _run(
    text: PaddedTokens,
    to_come: int,
    h: Float[Tensor, "1 tokens d_model"],
    *,
    edits: Sequence[Edit] = (),
    reads: Sequence[Read] = (),
) -> tuple[Float[Tensor, "1 tokens d_model"], dict[str, Tensor]]:
    """Edits and reads of a made-up model of one layer: first over the text, then over each token to come."""
    running = Intervention(text, edits, reads, n_layers=1, max_new_tokens=to_come)
    width = text.ids.shape[1]
    written = []
    for start, stop in [(0, width), *((token, token + 1) for token in range(width, width + to_come))]:
        # No model has this one: it ends no response, nor the thinking or the answer that the response begins in.
        running.begin_pass(text.ids if start == 0 else torch.tensor([[ID_LIMIT]]))
        written.append(running.block(0, h[:, start:stop]))
    return torch.cat(written, dim=1), running.results()


def _alike_at_the_end(treatment: Sequence[object]) -> int:
    """How many of the tokens to come can be left out, since they are treated as the last that is shown."""
    if not treatment:
        return 0
    others = [number for number, each in enumerate(treatment) if each != treatment[-1]]
    return max(0, len(treatment) - max(FEW, others[-1] + 2 if others else 0))


def _text(tokenizer: PreTrainedTokenizerBase, token: int | None, number: int) -> tuple[str, bool]:
    """What a token stands for, and whether it is special; number counts the response's tokens from 0."""
    if token is None:
        return f"response token {number}", False
    name = str(tokenizer.convert_ids_to_tokens(token))
    if token in tokenizer.all_special_ids:
        return name, True
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    if "\N{REPLACEMENT CHARACTER}" in text:  # a part of a character
        return name, False
    # Some tokenizers drop the space before the first word of what they decode.
    return f" {text}" if name.startswith("▁") and not text.startswith(" ") else text, False


def _quoted(token: PreviewedToken) -> Text:
    from rich.text import Text

    if token.special or token.id is None:
        return Text(token.text, style="dim")
    return Text(json.dumps(token.text, ensure_ascii=False))


def _action(edit: PreviewedEdit, factor: float) -> str:
    if not factor:
        return "·"
    if edit.operation is not Operation.ADD:
        said = str(edit.operation) if factor == 1 else f"{edit.operation} × {factor:g}"
    else:
        said = f"{factor * 100:+g}%" if edit.relative else f"{factor:+g}"
    return said if edit.condition is None else f"{said} if {edit.condition}"


def _where(layers: Sequence[int], n_layers: int) -> str:
    """Layers in words, those side by side as a range."""
    if not layers:
        return "nothing is left to ablate"
    if sorted(set(layers)) == list(range(n_layers)):
        return "all layers"
    numbers = sorted(set(layers))
    ranges = [list(run) for _, run in groupby(numbers, lambda layer: layer - numbers.index(layer))]
    return f"{'layer' if len(numbers) == 1 else 'layers'} {Layers(tuple((run[0], run[-1]) for run in ranges))}"
