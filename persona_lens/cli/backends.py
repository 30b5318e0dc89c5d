"""``persona-lens backends`` and ``remote``: which backends and servers there are, and whether backends agree."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli import options
from persona_lens.cli.display import print_plain_table, quiet_libraries, say, say_json, show_rows, showing_progress
from persona_lens.cli.runner import deliver
from persona_lens.cli.settings import Option
from persona_lens.core.errors import PersonaLensError

if TYPE_CHECKING:
    from persona_lens.backend.differences import Point
    from persona_lens.backend.protocol import Backend, ServerStatus
    from persona_lens.backend.registry import BackendStatus


ONLY = Option("Check only this one. Repeatable.", metavar="NAME", shown="all that are installed")
DTYPE = "`float32`, `bfloat16` or `float16`; tokens must be equal in float32 only."


@dataclass(frozen=True)
class Checked:
    """What was found for one backend.

    Attributes:
        backend: Its name.
        runs: What ran, with versions; None where the model could not be opened.
        error: Why it could not be opened.
        checks: Outcomes of the parity suite, failed ones included.
        points: Those of the check whether edits act.
    """

    backend: str
    runs: str | None
    error: str | None
    checks: Sequence[Point] = ()
    points: Sequence[Point] = ()

    @property
    def every(self) -> Sequence[Point]:
        """All of them."""
        return [*self.checks, *self.points]

    @property
    def passed(self) -> bool:
        """Whether it was opened and every check held."""
        return self.error is None and all(check.passed for check in self.every)

    def to_json(self) -> dict[str, Any]:
        """The values by name; JSON has no infinity."""
        head = {"backend": self.backend, "runs": self.runs, "error": self.error}
        steering = {"steering": [point.to_json() for point in self.points]} if self.points else {}
        return {**head, "passed": self.passed, "checks": [check.to_json() for check in self.checks], **steering}


def list_backends(as_json: options.AsJson = False) -> None:
    """List the backends, with the versions of what each one needs or the command that installs it.

    Example: `persona-lens backends list`
    """
    from persona_lens.backend import backend_statuses

    statuses = backend_statuses()
    if as_json:
        rows = [{**asdict(status), "available": status.available} for status in statuses]
        say_json({"backends": rows}, indent=2)
        return
    print_plain_table(
        ("backend", "state", "", ""),
        list(map(_status_row, statuses)),
    )


def check(
    model: options.Model,
    backend: Annotated[list[str] | None, ONLY] = None,
    backend_option: options.BackendOptions = None,
    dtype: Annotated[str, Option(DTYPE)] = "float32",
    device: Annotated[str, Option("`auto`, `cpu`, `cuda`, `cuda:N` or `mps`.")] = "auto",
    steering: Annotated[bool, Option("Only whether edits act, which takes a few passes; nothing is compared.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Check on a model of your own that every backend reads, edits and generates as it should.

    Each backend is compared with `transformers` (plain PyTorch hooks) and with itself: batches against single rows, a
    KV cache against none, reads while generating against reads of the finished text. Two copies of the model are in
    memory at a time. The exit code is 1 if a check fails.

    With `--steering` each is only tried for edits that must change residuals and the next token by amounts known
    beforehand: at every layer, beside rows without any, after a call that failed, and in the second turn of a
    conversation. Commands that open an engine or a server do that by themselves; `--no-verify` leaves it out.

    Example: `persona-lens backends check smollm2-135m`

    Example: `persona-lens backends check smollm2-135m --backend transformers --steering --dtype bfloat16`

    Example: `persona-lens backends check Qwen/Qwen2.5-0.5B-Instruct --backend nnsight --device cuda`

    Example: `persona-lens backends check ./my-model --dtype bfloat16 --json > parity.json`
    """
    from persona_lens.backend.registry import DEFAULT

    names, own = _chosen(backend or ()), options.own_options(backend_option)
    if own and len(names) != 1:
        raise PersonaLensError("--backend-option is for one backend; name it with --backend")
    compared = "" if steering else f", compared with {DEFAULT}"
    if not as_json and sys.stderr.isatty():
        say(f"checking {', '.join(names)} on {model}{compared}", err=True)
    quiet_libraries()
    results, found = [], _steered if steering else _results
    for result in found(names, model, own, dtype=dtype, **({} if device == "auto" else {"device": device})):
        results.append(result)
        if not as_json:
            _print_result(result)
    if as_json:
        reference = None if steering else DEFAULT
        head = {"model": model, "dtype": dtype, "reference": reference, "passed": all(r.passed for r in results)}
        say_json({**head, "backends": [result.to_json() for result in results]}, indent=2)
    if not all(result.passed for result in results):
        raise typer.Exit(1)


def _chosen(asked: Sequence[str]) -> list[str]:
    """The names asked for, each of which must be usable; or all that are."""
    from persona_lens.backend import backend_statuses, find_backend
    from persona_lens.backend.registry import DEFAULT

    if asked:
        for name in asked:
            find_backend(name)  # raises for one that cannot be used, before any model is loaded
        return list(dict.fromkeys(asked))
    available = [status.name for status in backend_statuses() if status.available]
    return sorted(available, key=lambda name: (name != DEFAULT, name))


def _steered(names: Sequence[str], model: str, own: Mapping[str, Any], **opening: str) -> Iterator[Checked]:
    """Whether edits act, on one backend after the other."""
    from persona_lens.backend.verification import try_edits

    for name in names:
        opened = _opened(name, model, **opening, **own)
        if isinstance(opened, str):
            yield Checked(name, None, opened)
        else:
            yield Checked(name, opened.info.backend, None, points=try_edits(opened))


def _opened(name: str, model: str, **options: Any) -> Backend | str:
    """The model through a backend; or why it could not be opened: the others are still checked."""
    from persona_lens.backend import open_backend

    try:
        return open_backend(name, model, **options)
    except Exception as error:  # noqa: BLE001 - a third party's adapter
        return str(error) if isinstance(error, PersonaLensError) else f"{type(error).__name__}: {error}"


def _results(names: Sequence[str], model: str, own: Mapping[str, Any], **opening: str) -> Iterator[Checked]:
    from persona_lens.backend import open_backend
    from persona_lens.backend.parity import check_parity
    from persona_lens.backend.registry import DEFAULT

    reference = open_backend(DEFAULT, model, **opening, **(own if DEFAULT in names else {}))
    for name in names:
        opened = reference if name == DEFAULT else _opened(name, model, **opening, **own)
        if isinstance(opened, str):
            yield Checked(name, None, opened)
            continue
        with showing_progress() as progress:
            checks = check_parity(opened, None if opened is reference else reference, progress=progress)
        yield Checked(name, opened.info.backend, None, checks)


def _status_row(status: BackendStatus) -> tuple[str, ...]:
    state = "ready" if status.available else "broken" if status.broken else "not installed"
    versions = ", ".join(f"{name} {version}" for name, version in status.versions.items() if version)
    remark = status.broken or (status.summary if status.available else status.install)
    return status.name, state, versions, remark


def _print_result(result: Checked) -> None:
    if result.error is not None:
        say(f"{result.backend}: could not be opened: {result.error}\n")
        return
    every = result.every
    failed = sum(not check.passed for check in every)
    verdict = f"{failed} of {len(every)} checks failed" if failed else f"all {len(every)} checks passed"
    if result.points:
        print_plain_table(
            ("", "check", "expected", "measured", "", "off by", "allowed", "detail"),
            [(*_of(p), *_values(p), f"{p.error:.1e}", f"{p.tolerance:.1e}", p.detail) for p in result.points],
        )
    else:
        print_plain_table(
            ("", "check", "measured", "allowed", "detail"),
            [(*_of(c), f"{c.measured:.1e}", f"{c.tolerance:.1e}", c.detail) for c in result.checks],
        )
    say(f"{result.backend} ({result.runs}): {verdict}\n")


def _of(check: Point) -> tuple[str, str]:
    return "ok" if check.passed else "FAILED", check.name


def _values(point: Point) -> tuple[str, str, str]:
    return f"{point.expected:.4g}", f"{point.measured:.4g}", point.unit


def status(backend: options.Backends = "nnsight", as_json: options.AsJson = False) -> None:
    """Say whether the configured server can be used, and which models it has.

    The exit code is 1 if it cannot be used.

    Example: `NDIF_HOST=https://api.ndif.us persona-lens remote status`
    """
    from persona_lens.backend import find_backend

    spec = find_backend(backend)
    if spec.server is None:
        raise PersonaLensError(f"backend {backend} runs models here only; it has no server")
    found = spec.server()
    deliver(asdict(found), lambda: _show(found), as_json)


def _show(found: ServerStatus) -> None:
    key = "accepted" if found.key else "none; the server wants none"
    say(f"{found.host} can be used (key: {key}{f', of {found.account}' if found.account else ''})")
    if not found.deployments:
        say("no model is loaded there at the moment")
        return
    show_rows(
        "Models",
        found.deployments,
        {
            "model": "model",
            "revision": "revision",
            "state": lambda each: each.state.lower(),
            "answers now": "usable",
        },
    )
