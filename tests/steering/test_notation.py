"""How a steering is written, and what an error points at."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_lens.backend import Operation, Positions, Schedule, Span
from persona_lens.steering import NotationError, parse_terms
from persona_lens.steering.notation import Layers, Term, When

WRITTEN: dict[str, Term] = {
    "optimistic@18:+1.5": Term("optimistic", Layers(((18, 18),)), Operation.ADD, 1.5),
    "evil@all:ablate": Term("evil", Layers(), Operation.ABLATE),
    "evil@all:ablate(0.5)": Term("evil", Layers(), Operation.ABLATE, 0.5),
    "evil@10-12+20:-2": Term("evil", Layers(((10, 12), (20, 20))), Operation.ADD, -2.0),
    "evil@3:+30%": Term("evil", Layers(((3, 3),)), Operation.ADD, 0.3, relative=True),
    "evil@all:increments(1)": Term("evil", Layers(), Operation.ADD, 1.0, increments=True),
    "evil@3:cap(2.5)": Term("evil", Layers(((3, 3),)), Operation.CAP, 2.5),
    "evil@3:floor(-1)": Term("evil", Layers(((3, 3),)), Operation.FLOOR, -1.0),
    "evil@3:affine(0)": Term("evil", Layers(((3, 3),)), Operation.AFFINE, 0.0),
    "evil.prompt_mean@3:+1": Term("evil", Layers(((3, 3),)), Operation.ADD, 1.0, reduction="prompt_mean"),
    "evil": Term("evil"),
    "evil:-2": Term("evil", None, Operation.ADD, -2.0),
    "evil:+1 on response[5:]": Term("evil", None, Operation.ADD, 1.0, positions=Span(Positions.RESPONSE, 5)),
    "evil:+1 on prompt[-3:-1]": Term("evil", None, Operation.ADD, 1.0, positions=Span(Positions.PROMPT, -3, -1)),
    "evil:+1 on generating[:7]": Term("evil", None, Operation.ADD, 1.0, positions=Span(Positions.GENERATING, 0, 7)),
    "evil:ablate with sinks": Term("evil", None, Operation.ABLATE, sinks=True),
    "evil:cap(1) on prompt with sinks": Term("evil", None, Operation.CAP, 1.0, positions=Positions.PROMPT, sinks=True),
    "evil:+1 on prompt": Term("evil", None, Operation.ADD, 1.0, positions=Positions.PROMPT),
    "evil:+1 if kind>3": Term("evil", None, Operation.ADD, 1.0, when=When("kind", None, 3.0)),
    "evil:+1 if kind@2<-0.5": Term("evil", None, Operation.ADD, 1.0, when=When("kind", 2, -0.5, above=False)),
    "evil:+1 schedule(0:1 20:0)": Term("evil", None, Operation.ADD, 1.0, schedule=Schedule(((0, 1.0), (20, 0.0)))),
}


@pytest.mark.parametrize(("text", "term"), WRITTEN.items(), ids=WRITTEN.keys())
def test_what_is_written_is_what_is_read(text: str, term: Term) -> None:
    assert parse_terms(text) == (term,)
    assert parse_terms(f" {text.replace(':', ' : ').replace('@', ' @ ')} ") == (term,)  # spaces mean nothing
    assert parse_terms(f"{text},other") == (term, Term("other"))


numbers = st.floats(-100, 100).map(lambda number: round(number, 6) or 0.0)
names = st.from_regex(r"[a-z][a-z0-9_\-]{0,8}", fullmatch=True)
layers = st.one_of(
    st.just(Layers()),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), min_size=1, max_size=3).map(
        lambda pairs: Layers(tuple((first, first + more) for first, more in pairs))
    ),
)
spans = st.one_of(
    st.sampled_from(Positions),
    st.builds(lambda start, more: Span(Positions.RESPONSE, start, start + more), st.integers(0, 9), st.integers(1, 9)),
    st.builds(Span, st.just(Positions.PROMPT), st.integers(-9, 9)),
)
additions = st.builds(
    lambda amount, how: {"operation": Operation.ADD, "amount": amount, **how},
    numbers,
    st.sampled_from([{}, {"relative": True}, {"increments": True}]),
)
others = st.builds(
    lambda operation, amount: {"operation": operation, "amount": amount},
    st.sampled_from([Operation.CAP, Operation.FLOOR, Operation.AFFINE, Operation.ABLATE]),
    numbers,
)
terms = st.builds(
    lambda trait, where, action, positions, sinks, schedule, when: Term(
        trait, where, **action, positions=positions, sinks=sinks, schedule=schedule, when=when
    ),
    names,
    layers,
    additions | others,
    spans,
    st.booleans(),
    st.none() | st.builds(lambda a, b: Schedule(((0, a), (7, b))), numbers, numbers),
    st.none() | st.builds(When, names, st.none() | st.integers(0, 9), numbers, st.booleans()),
)


@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@given(st.lists(terms, min_size=1, max_size=3))
def test_what_is_shown_is_read_as_the_same(several: list[Term]) -> None:
    shown = ", ".join(map(str, several))
    again = parse_terms(shown)
    assert ", ".join(map(str, again)) == shown
    for term, found in zip(several, again, strict=True):
        assert found.amount == pytest.approx(term.amount, rel=1e-9, abs=1e-12)
        assert (found.trait, found.layers, found.positions, found.when) == (
            term.trait,
            term.layers,
            term.positions,
            term.when,
        )


WRONG: dict[str, tuple[str, int, str]] = {
    "nothing": ("", 0, "expected a trait's name"),
    "rubbish at the end": ("optimistic@18:+1.5x", 18, "expected '%', ',', 'if', 'on', 'schedule' or 'with'"),
    "no number": ("optimistic@18:+", 14, "expected a number such as +1.5, 'ablate', 'affine', 'cap', 'floor'"),
    "no action": ("evil@3", 0, "evil has layers but nothing to do there, such as :+1.5 or :ablate"),
    "backwards": ("evil@5-3:+1", 5, "the layers 5-3 run backwards"),
    "unknown action": ("evil@3:ablte", 7, "expected a number such as +1.5, 'ablate'"),
    "no threshold": ("evil@3:cap", 10, "expected '('"),
    "unknown positions": ("evil@3:+1 on reply", 13, "expected all, prompt, response, generating, thinking or answer"),
    "end of a response": ("evil@3:+1 on response[-2:]", 10, "counts from the end"),
    "twice": ("evil@3:+1 on all on all", 0, "evil: positions is given twice"),
    "one point": ("evil@3:+1 schedule(0:1)", 22, "expected a whole number"),
    "points out of order": ("evil@3:+1 schedule(5:1 2:0)", 10, "must ascend"),
    "second term": ("evil@3:+1, kind@:+1", 16, "expected a whole number or 'all'"),
    "comma at the end": ("evil@3:+1,", 10, "expected a trait's name"),
    "increments nowhere": ("evil:increments(1)", 0, "increments go from layer to layer"),
    "no side": ("evil@3:+1 if kind", 17, "expected > or < or '@'"),
}


@pytest.mark.parametrize(("text", "place", "message"), WRONG.values(), ids=WRONG.keys())
def test_an_error_points_at_the_character(text: str, place: int, message: str) -> None:
    with pytest.raises(NotationError) as caught:
        parse_terms(text)
    first, shown, mark = str(caught.value).split("\n")
    assert first == "the steering cannot be read:"
    assert shown == f"  {text}"
    assert mark.index("^") - 2 == place
    assert message in mark


@given(st.text(alphabet="evil@18:+.5%, onifschedule()[]<>-\n", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(NotationError):
        assert parse_terms(text)


@pytest.mark.parametrize("text", ["assistant@4-6:floor(p25)", "evil@3:cap(p97.5) on response", "evil@3:affine(p0)"])
def test_levels_may_be_percentiles_and_are_written_as_they_were(text: str) -> None:
    (term,) = parse_terms(text)
    assert str(term) == text
    assert term.scaled(2.0) == term


@pytest.mark.parametrize(("text", "said"), [("evil@3:cap(p101)", "from p0 to p100"), ("evil@3:ablate(p5)", "expected")])
def test_a_percentile_is_a_level_from_0_to_100(text: str, said: str) -> None:
    with pytest.raises(NotationError, match=said):
        parse_terms(text)
