"""`verify`: whether edits act on a model as it was opened, where they may as well do nothing without any error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from persona_lens.backend.batches import context_length
from persona_lens.backend.blocks import ModuleBackend
from persona_lens.backend.differences import Point
from persona_lens.backend.protocol import Backend, BackendError, RemoteBackend, RemoteError, fingerprint_of
from persona_lens.backend.trial import REST, Texts, Tolerance, Trial, Undecided
from persona_lens.core.errors import in_words

# How texts begin, three ways to go on, another text, and what a second turn adds.
TEXTS = (
    ("The people of this town have", (" always", " three", " to"), "When I was young, my father", " And then"),
    ("In the middle of the night the", (" old", " door", " is"), "Please send the money before", " But why"),
    ("She looked at the small red", (" car", " and", " in"), "It is said that nobody can", " Tell me"),
    ("There is no water in the", (" house", " as", " next"), "We have to be at the", " Go on"),
    ("He never told anybody what he", (" had", " saw", " is"), "The price of bread went", " So what"),
)
DRAWN = 5  # texts of random tokens, where nothing can be told from these
UNDECIDED = "what comes next depends on the text"
# Rounding makes a seventh of it at most in residuals of tiny random models of fourteen architectures. In the next token
# and its probability it exceeds it with one text in sixty in 16 bits, and never in float32.
FULL = Tolerance(error=1e-2, least=2e-3, felt=1e-3)
HALF = {
    "float16": Tolerance(error=0.1, least=5e-3, felt=2e-2, wide=False),
    "bfloat16": Tolerance(error=0.3, least=2e-2, felt=5e-2),
}
_verified: set[str] = set()  # fingerprints of models, as they were opened in this process


class VerificationError(BackendError):
    """Edits do not act as they should; the message says which do not, and what to do."""


def verify(backend: Backend) -> list[Point]:
    """Make sure that edits act, each by an amount that is known beforehand; see `persona_lens.backend.trial`.

    At every layer in one forward pass, in rows beside rows that stay as they are, after a call that failed, and at
    every token of a second turn that goes on from what was kept of the first. A model whose calls are requests that
    wait in a queue is sent three, and not all of this.

    Args:
        backend: The model.

    Returns:
        What was tried.

    Raises:
        VerificationError: If an edit does not act, or another than was asked for.
    """
    points = try_edits(backend)
    require(backend, points)
    _verified.add(backend.info.fingerprint)
    return points


def require(backend: Backend, points: Sequence[Point]) -> None:
    """Raise `VerificationError` unless all of them hold."""
    info = backend.info
    handed_over = info.revision is None and not info.remote
    nameless = info.model == info.architecture
    model = f"the model that was given, a {info.architecture}" if nameless else info.model
    failed = [point for point in points if not point.passed]
    if failed:
        first = failed[0]
        if first.name == UNDECIDED:
            raise VerificationError(
                f"whether edits act on {model} ({info.backend}) cannot be told: {first.detail}; "
                "go on without trying them (`--no-verify`), or take another model"
            )
        precision = f" --dtype {info.dtype}" if info.dtype in HALF else ""  # float32 if nothing is said
        command = f"persona-lens backends check {info.model} --steering{precision}"
        raise VerificationError(
            f"edits do not act as they should on {model} ({info.backend}): {first.name}: "
            f"{first.in_short}{f' ({len(failed)} of {len(points)} checks fail)' if len(failed) > 1 else ''}; nothing "
            f"steered here could be trusted. {_advice(backend)}; "
            f"`{'persona_lens.backend.verification.try_edits' if handed_over else command}` shows every check"
        )


def try_edits(backend: Backend) -> list[Point]:
    """What `verify` tries, whether it holds or not.

    Other texts are tried where nothing can be told from the first, and where something fails: rounding alone may send a
    token to another expert, or decide between two tokens that are as likely. Where nothing can be told from any, as of
    a tokenizer to which all words are unknown, random tokens are.
    """
    limit = context_length(backend)
    if limit is not None and limit <= REST:
        return [Point.failure(UNDECIDED, f"it takes {limit} tokens, and edits are tried on texts of {REST + 1}")]
    tolerance = tolerance_of(backend)
    found: list[Point] = []
    for number, texts in enumerate(_texts(backend)):
        if found and number == len(TEXTS):
            break
        trial = Trial(backend, texts, tolerance)
        try:
            points = trial.points()
        except Undecided:
            continue
        except RemoteError:
            raise
        except Exception as error:  # noqa: BLE001 - of libraries; whatever it is, nothing is known to act
            points = [*trial.found, Point.failure("every call can be made", in_words(error))]
        found = found or points
        if all(point.passed for point in points):
            return points
        if isinstance(backend, RemoteBackend):
            break
    said = "the model goes on alike from all texts that were tried, so that no edit can be told from none"
    return found or [Point.failure(UNDECIDED, said)]


def _texts(backend: Backend) -> Iterator[Texts]:
    yield from (Texts.of(backend, *texts) for texts in TEXTS)
    yield from Texts.drawn(backend, DRAWN)


def tolerance_of(backend: Backend) -> Tolerance:
    """What is allowed in the precision of a model; a server keeps to itself what it is."""
    dtype = backend.info.dtype
    if dtype == "remote":
        return replace(HALF["bfloat16"], wide=False)
    return FULL if dtype in ("float32", "float64") else HALF.get(dtype, HALF["bfloat16"])


def is_engine(backend: Backend) -> bool:
    """Whether a model is run by something else than its own module in reach of hooks: an engine or a server."""
    over = getattr(backend, "over", None)
    if over is not None and not isinstance(backend, ModuleBackend):  # in Ray workers: what do they run?
        answer: Callable[[], bool] = over(_answering)
        return answer()
    return backend.info.remote or not isinstance(backend, ModuleBackend)


def _answering(backend: Backend) -> Callable[[], bool]:
    return lambda: is_engine(backend)


def was_verified(model: object) -> bool:
    """Whether a model was verified in this process.

    Args:
        model: What a record has of it, made by `dataclasses.asdict` of its `ModelInfo`.
    """
    return isinstance(model, Mapping) and bool(_verified) and fingerprint_of(model) in _verified


def _advice(backend: Backend) -> str:
    if backend.info.remote:
        return "Ask whoever runs the server, or open the model here"
    return (
        "Take away what else hooks, compiles or replaces the model's blocks or keeps what they computed, or open it "
        "through another --backend, and report it with the versions"
    )
