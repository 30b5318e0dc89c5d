"""Judges by name: what ``--judge NAME:…`` opens, those of this package and those of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from persona_lens.backend import Backend
from persona_lens.core.plugins import Registry
from persona_lens.core.text import listed
from persona_lens.judging.llm import LLMJudge
from persona_lens.judging.protocol import Judge, Judged, JudgingError, Method
from persona_lens.judging.reading import LocalJudge
from persona_lens.models import ChatFormat
from persona_lens.models.server import CompletionServer

Judging: TypeAlias = Callable[[Judged], Judge]
"""The judge of a trait, or of a role; those of several traits share a model, or a server and its spending limit."""


@dataclass(frozen=True)
class Opening:
    """What there is to open a judge with.

    Attributes:
        what: What stands behind the colon; may be empty.
        subject: The model whose responses are judged, with its chat format; None where there are only responses.
        model: Opens another model by its name.
        server: The server that options describe, for a model by its name.
        calibrated: The likelihood judge as it was calibrated for the vectors in a file or run folder.
        options: What else was given, by the name of the option, such as ``judge_prefill``.
    """

    what: str
    subject: tuple[Backend, ChatFormat] | None
    model: Callable[[str], tuple[Backend, ChatFormat]]
    server: Callable[[str], CompletionServer]
    calibrated: Callable[[str], Judging]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class JudgeSpec:
    """How a judge presents itself; the object that an entry point of the group ``persona_lens.judges`` names.

    Attributes:
        open: Makes it. None stands for the likelihood judge of a run, which calibrates it itself.
        beside: How it is written where there is a subject model, such as ``local`` and ``local:MODEL``.
        alone: How it is written where there are only responses.
        options: Options that only it has a use for, such as ``--judge-prefill``.
        uses_options: The ways of writing it in which it has a use for them.
    """

    open: Callable[[Opening], Judging | None]
    beside: tuple[str, ...]
    alone: tuple[str, ...]
    options: tuple[str, ...] = ()
    uses_options: tuple[str, ...] = ()


def _likelihood(opening: Opening) -> Judging | None:
    return opening.calibrated(opening.what) if opening.what else None


def _local(opening: Opening) -> Judging:
    found = opening.model(opening.what) if opening.what or opening.subject is None else opening.subject
    return lambda trait: LocalJudge(*found, trait, prefill=opening.options.get("judge_prefill") or "")


def _openai(opening: Opening) -> Judging:
    server = opening.server(opening.what)
    return lambda trait: LLMJudge(server, trait, method=Method(opening.options.get("judge_method") or Method.AUTO))


SERVER_OPTIONS = ("url", "key", "method", "at-once", "rate")
JUDGES: Registry[JudgeSpec] = Registry(
    "persona_lens.judges",
    JudgeSpec,
    "judge",
    JudgingError,
    {
        "likelihood": JudgeSpec(
            _likelihood, ("likelihood",), ("likelihood:VECTORS",), ("--judge-model",), ("likelihood:VECTORS",)
        ),
        "local": JudgeSpec(
            _local, ("local", "local:MODEL"), ("local:MODEL",), ("--judge-prefill",), ("local", "local:MODEL")
        ),
        "openai": JudgeSpec(
            _openai,
            ("openai:MODEL",),
            ("openai:MODEL",),
            (*(f"--judge-{name}" for name in SERVER_OPTIONS), "--prices", "--max-spend"),
            ("openai:MODEL",),
        ),
    },
)


def find_judge(written: str, *, alone: bool) -> JudgeSpec:
    """The judge that is written so, ``NAME`` or ``NAME:WHAT``.

    Args:
        written: How.
        alone: Whether there are only responses, and no subject model.

    Raises:
        JudgingError: If there is none, or it is broken, or it is not written in one of its ways.
    """
    name = written.partition(":")[0]
    if name in JUDGES.everything():
        spec = JUDGES.find(name)
        if is_written(written, spec.alone if alone else spec.beside):
            return spec
    ways = [way for spec in JUDGES.usable().values() for way in (spec.alone if alone else spec.beside)]
    known = listed(ways, "or")
    told = f"a judge is {known} (VECTORS is a run folder of extract)" if alone else f"--judge takes {known}"
    raise JudgingError(f"{told}; got {written!r}")


def is_written(written: str, ways: tuple[str, ...]) -> bool:
    """Whether a judge is written in one of these ways."""
    name, _, what = written.partition(":")
    return any((name, bool(what)) == (way.partition(":")[0], ":" in way) for way in ways)


def refuse_useless(given: Sequence[str], written: str) -> None:
    """Raise `JudgingError` for options, by their names, that only other judges have a use for."""
    for spec in JUDGES.usable().values():
        names = [name for name in given if name in spec.options]
        if names and not is_written(written, spec.uses_options):
            ways = " or ".join(spec.uses_options)
            raise JudgingError(f"{', '.join(names)}: only for --judge {ways}, this is {written!r}")


def judges() -> dict[str, JudgeSpec]:
    """The judges by name, those of other packages too; `docs/judging.md` says what each is."""
    return JUDGES.usable()
