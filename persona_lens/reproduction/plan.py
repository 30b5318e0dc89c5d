"""`Plan`: commands as a user would type them, what each takes from those before it, and for which traits it is run.

In a command ``{model}``, ``{trait}`` and ``{out}`` stand for these, ``{NAME}`` for a value, a file or the folder of a
step of the plan, ``{NAME.all}`` for that step's folders of all traits, ``{NAME.layer}`` and ``{NAME.coefficient}`` for
what was tuned for the vectors in its folder (``{NAME.coefficient*0.5}`` for half of it), and ``{NAME.60%}`` for the
layer at 60% of their model's depth. A value that is ``null`` has to be given, or the steps that name it are left out.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from persona_lens.core.documents import DocumentError, parse_yaml
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import named, read_bytes
from persona_lens.core.text import in_short, shown

PLANS = Path(__file__).with_name("plans")
FIELDS = ("scale", "traits", "values", "files", "steps")
STEP_FIELDS = ("run", "once", "traits")
ALWAYS = ("model", "trait", "out")
_TRAIT = re.compile(r"[A-Za-z][\w-]*")
_NAME = re.compile(r"[a-z][a-z0-9-]*")
_FILE = re.compile(r"[a-z][a-z0-9-]*\.ya?ml")
_BRACES = re.compile(r"\{([^{}]*)\}")
_REFERENCE = re.compile(r"([a-z][a-z0-9-]*)(?:\.(all|layer|\d+%|coefficient(?:\*(-?\d+(?:\.\d+)?))?))?")
MAX_STEPS = 200


class PlanError(PersonaLensError):
    """A plan that cannot be carried out; the message says what to put right."""


@dataclass(frozen=True)
class Reference:
    """What stands in braces, if it is of a step.

    Attributes:
        step: Its name.
        what: ``all``, ``layer``, ``coefficient`` or a share of the depth such as ``60%``; None is its folder.
        factor: What a coefficient is multiplied by.
    """

    step: str
    what: str | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Step:
    """One command of a plan.

    Attributes:
        name: What it is called.
        words: The command, words with braces among them.
        once: Whether it is run once, and not for each trait.
        traits: The only traits that it is run for; None for all.
    """

    name: str
    words: tuple[str, ...]
    once: bool = False
    traits: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Task:
    """A step for one trait, or once.

    Attributes:
        step: The step.
        trait: The trait; None of what is run once.
    """

    step: Step
    trait: str | None = None

    @property
    def name(self) -> str:
        """What its folder is called."""
        return self.step.name if self.trait is None else f"{self.step.name}-{self.trait}"


@dataclass(frozen=True)
class Plan:
    """Steps, and what is the same in several of them.

    Attributes:
        scale: What the plan is called.
        traits: The traits.
        values: Texts that stand for words; None for what has to be given.
        files: Contents of files that commands read, by name.
        steps: By name, as they are written.
    """

    scale: str
    traits: tuple[str, ...]
    values: Mapping[str, str | None]
    files: Mapping[str, Any]
    steps: Mapping[str, Step]

    def __post_init__(self) -> None:
        for step in self.steps.values():
            for inner in self.inside(step):
                self._check(step, inner)
        self.ordered  # noqa: B018 - a circle is found here

    def to_json(self) -> dict[str, Any]:
        """It as JSON values, for the record of a run."""
        steps = {
            each.name: {"run": shlex.join(each.words), "once": each.once, "traits": each.traits and list(each.traits)}
            for each in self.steps.values()
        }
        return {"scale": self.scale, "values": dict(self.values), "files": dict(self.files), "steps": steps}

    @cached_property
    def ordered(self) -> tuple[Step, ...]:
        """The steps, each behind those that it names, else as they are written.

        Raises:
            PlanError: If steps name each other in a circle.
        """
        needs = {name: [each.step for each in self.references(step)] for name, step in self.steps.items()}
        sorter = TopologicalSorter(needs)
        try:
            sorter.prepare()
        except CycleError as error:
            circle = " needs ".join(reversed(error.args[1]))
            raise PlanError(f"steps of the plan need each other in a circle: {circle}") from None
        found: list[str] = []
        while len(found) < len(needs):
            found.append(next(name for name in needs if name not in found and set(needs[name]) <= set(found)))
        return tuple(self.steps[name] for name in found)

    def tasks(self) -> Iterator[Task]:
        """Every step for every trait that it is run for, in order."""
        for step in self.ordered:
            yield from self.tasks_of(step.name)

    def tasks_of(self, name: str) -> list[Task]:
        """The tasks of a step."""
        step = self.steps[name]
        if step.once:
            return [Task(step)]
        return [Task(step, trait) for trait in self.traits if step.traits is None or trait in step.traits]

    def inside(self, step: Step) -> Iterator[str]:
        """What stands in braces in a step, that of the values in it too.

        Raises:
            PlanError: If a value stands for itself.
        """
        for word in step.words:
            yield from self._braces(word)

    def _braces(self, text: str, within: Sequence[str] = ()) -> Iterator[str]:
        for inner in _BRACES.findall(text):
            if inner in within:
                raise PlanError(f"the value {inner!r} stands for itself; write out what it stands for")
            yield inner
            yield from self._braces(self.values.get(inner) or "", (*within, inner))

    def references(self, step: Step) -> list[Reference]:
        """The steps that a step names."""
        known = (*ALWAYS, *self.values, *self.files)
        return [reference_of(inner) for inner in self.inside(step) if inner not in known]

    def missing(self, step: Step) -> list[str]:
        """The values that a step names and nobody gave."""
        return [inner for inner in self.inside(step) if inner in self.values and self.values[inner] is None]

    def needs(self, task: Task) -> list[Task]:
        """What has to be finished before a task."""
        found = []
        for each in self.references(task.step):
            every = self.tasks_of(each.step)
            own = [one for one in every if one.trait in (None, task.trait)]
            found += every if each.what == "all" else own or every[:1]  # a layer at a share of the depth is any trait's
        return list(dict.fromkeys(found))

    def _check(self, step: Step, inner: str) -> None:
        if inner in self.values or inner in self.files or inner in ("model", "out"):
            return
        where = f"the step {step.name!r}"
        if inner == "trait":
            if step.once:
                raise PlanError(f"{where} is run once and names {{trait}}; leave out `once`, or name the trait itself")
            return
        reference = reference_of(inner)
        if reference.step not in self.steps:
            known = ", ".join((*ALWAYS, *self.values, *self.files, *self.steps))
            raise PlanError(f"{where} names {{{inner}}}, and there is no such step, value or file; there are {known}")
        named_step = self.steps[reference.step]
        if step.once and reference.what != "all" and not self.tasks_of(reference.step):
            raise PlanError(
                f"{where} names {{{inner}}}, and {reference.step!r} is run for none of the traits; name one"
            )
        if named_step.once or (reference.what or "").endswith(("all", "%" if step.once else "all")):
            return
        if step.once:
            raise PlanError(
                f"{where} is run once, and {reference.step!r} for each trait; write {{{reference.step}.all}} for the "
                "folders of all of them"
            )
        own = [trait for trait in step.traits or self.traits if trait in self.traits]
        if lacking := [trait for trait in own if named_step.traits is not None and trait not in named_step.traits]:
            raise PlanError(
                f"{where} names {{{inner}}}, which is not run for the trait {lacking[0]!r}; give both steps the same "
                "`traits`"
            )


def reference_of(inner: str) -> Reference:
    """What stands in braces, as a reference to a step.

    Raises:
        PlanError: If it is not written as one.
    """
    found = _REFERENCE.fullmatch(inner)
    if found is None:
        raise PlanError(
            f"{{{in_short(inner)}}} is not how a plan names something; it takes {{NAME}}, {{NAME.all}}, "
            "{NAME.layer}, {NAME.coefficient}, {NAME.coefficient*0.5} or {NAME.60%}"
        )
    step, what, factor = found.groups()
    return Reference(step, "coefficient" if factor else what, float(factor or 1))


# Reading


def built_in_plans() -> tuple[str, ...]:
    """The scales that come with the package, the smallest first."""
    return tuple(sorted((file.stem for file in PLANS.glob("*.yaml")), key=("tiny", "small", "paper").index))


def plan_text(plan: Path | str) -> str:
    """The text of a plan: of a file, or of a scale that comes with the package.

    Raises:
        PlanError: If there is no such file.
    """
    file = PLANS / f"{plan}.yaml" if str(plan) in built_in_plans() else Path(plan)
    with named(file, PlanError, "read"):
        try:
            return read_bytes(file, PlanError).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise PlanError(f"the plan {file} is not text in UTF-8") from None


def read_plan(
    plan: Path | str, traits: Sequence[str] | None = None, given: Mapping[str, str | None] | None = None
) -> Plan:
    """Read a plan.

    Args:
        plan: A file, or a scale that comes with the package.
        traits: The traits, in place of its own.
        given: Values in place of its own; None leaves its own.

    Raises:
        PlanError: If it cannot be read, or cannot be carried out.
    """
    try:
        document = parse_yaml(plan_text(plan))
    except DocumentError as error:
        raise PlanError(f"the plan {plan} is {error}") from error
    fields = _mapping(document, "the plan", FIELDS)
    values = {name: _text(each, name) for name, each in _mapping(fields.get("values"), "values").items()}
    steps = _mapping(fields.get("steps"), "steps")
    if not steps or len(steps) > MAX_STEPS:
        raise PlanError(f"a plan has 1 to {MAX_STEPS} steps under `steps:`, and {plan} has {len(steps)}")
    own = traits or _texts(fields.get("traits"), "traits")
    if not own or len(set(own)) < len(own) or not all(map(_TRAIT.fullmatch, own)):
        raise PlanError(f"give traits by their names, each once: got {in_short(', '.join(own)) or 'none'}")
    files = _mapping(fields.get("files"), "files")
    if wrong := [name for name in files if not _FILE.fullmatch(name)]:
        raise PlanError(f"files of a plan are called such as recipe.yaml, got {shown(wrong[0])}")
    named_twice = [name for name in steps if name in values or name in ALWAYS]
    if named_twice:
        raise PlanError(f"{named_twice[0]!r} is a step and a value; give one of them another name")
    taken = {name: value for name, value in (given or {}).items() if value is not None}
    return Plan(
        str(fields.get("scale", plan)),
        tuple(own),
        {**values, **{name: shlex.quote(value) for name, value in taken.items()}},
        files,
        {name: _step(name, each) for name, each in steps.items()},
    )


def _step(name: str, given: Any) -> Step:
    if not _NAME.fullmatch(name):
        raise PlanError(f"steps are called in small letters, such as finetune-strong: got {in_short(name)!r}")
    fields = {"run": given} if isinstance(given, str) else _mapping(given, f"the step {name!r}", STEP_FIELDS)
    run, once, traits = fields.get("run"), fields.get("once", False), fields.get("traits")
    if not isinstance(run, str) or not isinstance(once, bool):
        raise PlanError(f"the step {name!r} needs a command under `run:`, and `once` is true or false")
    try:
        words = tuple(shlex.split(run))
    except ValueError as error:
        raise PlanError(f"the command of the step {name!r} cannot be read: {error}") from error
    if words[:1] == ("persona-lens",) or not words:
        raise PlanError(f"the step {name!r} needs a command without persona-lens, such as extract {{model}} {{trait}}")
    return Step(name, words, once, None if traits is None else _texts(traits, f"traits of the step {name!r}"))


def _mapping(value: Any, what: str, known: Sequence[str] | None = None) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise PlanError(f"{what} must be fields by name, got {shown(value)}")
    unknown = [name for name in value if known is not None and name not in known]
    if unknown:
        raise PlanError(f"{what} has no field {in_short(unknown[0])!r}; there are {', '.join(known or ())}")
    return value


def _texts(value: Any, what: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise PlanError(f"{what} must be a list of names, got {shown(value)}")
    return tuple(value)


def _text(value: Any, name: str) -> str | None:
    if isinstance(value, str):
        try:
            shlex.split(value)
        except ValueError as error:
            raise PlanError(f"the value {name!r} cannot be read as words of a command: {error}") from error
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:g}"
    raise PlanError(f"the value {name!r} must be a text, a number or null, got {shown(value)}")
