"""What a run would ask, counted."""

from __future__ import annotations

from typing import Any

from persona_lens.backend import Edit, TokenBatch
from persona_lens.runs.cost import Work, reading_work, together
from tests.backends.fixtures import backend_of, direction
from tests.tiny import tiny_model


def test_what_runs_once_is_told() -> None:
    """As many tokens run, embedded one by one, as are left without them."""
    model: Any = tiny_model()
    backend, ran = backend_of("transformers", model), 0

    def count(_: Any, given: tuple[Any, ...], __: Any) -> None:
        nonlocal ran
        ran += given[0].numel()

    tokens = TokenBatch.of([[5, 6, 7]] * 4, [[8, 5], [9, 5], [10, 5], [11, 5]])
    work = reading_work("reading", backend, [tokens], logprobs=True)
    assert (work.rows, work.tokens, work.spared) == (4, 20, 13)
    handle = model.get_input_embeddings().register_forward_hook(count)
    backend.forward(tokens, logprobs=True)
    handle.remove()
    assert ran == work.tokens - work.spared == 7
    edit = Edit(1, direction(0))
    assert reading_work("reading", backend, [tokens], edits=[edit], logprobs=True).spared == 0


def test_work_is_added_up_by_its_label() -> None:
    one, other = Work("one", 1, 2, 3, spared=1), Work("other", 1, 1, 1, at_most=True)
    assert together([one, other, one]) == (one * 2, other)
    assert one * 2 == Work("one", 2, 4, 6, spared=2)
