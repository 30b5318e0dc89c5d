"""Options made from what they set: a command's parameters, dataclasses of options, and settings of the library.

What an option does is said once, in the docstring of what it sets: the `Args:` of a command, the `Attributes:` of a
dataclass, or the text under a pydantic field. Settings of the library are read from their source (`cli/sources.py`),
so that the help of a command imports none of the engine.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import StrEnum
from fnmatch import fnmatch
from functools import wraps
from operator import itemgetter
from pkgutil import resolve_name
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo

from persona_lens.cli.sources import Field, documented, fields_of, prose
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import in_short


@dataclass(frozen=True)
class Option:
    """What there is to say of an option beside its type, its default and what its docstring says.

    Attributes:
        help: What it does, in place of the docstring.
        names: How it is written, by default after its parameter.
        metavar: What stands for its value.
        values: What it takes, said behind what it does.
        shown: What stands for its default.
        least: The smallest number.
        most: The largest number.
        argument: Whether it is an argument.
        at_once: What is called with its value before anything else.
    """

    help: str | None = None
    names: tuple[str, ...] | None = None
    metavar: str | None = None
    values: str | None = None
    shown: str | None = None
    least: int | None = None
    most: int | None = None
    argument: bool | None = None
    at_once: Callable[[Any], None] | None = None

    def over(self, other: Option) -> Option:
        """This, and what the other says where this says nothing."""
        return Option(**{name: getattr(other, name) if mine is None else mine for name, mine in vars(self).items()})


def argument(metavar: str, help: str) -> Option:
    """An argument."""
    return Option(help, metavar=metavar, argument=True)


class Fields:
    """Which fields of a class are options, for ``Annotated``.

    Args:
        source: Settings of the library, ``module:Class``, for a `Given`; None takes the class annotated.
        without: Fields that are no options.
        optional: Options are None where they are not given, whatever the field's default.
        changed: What is otherwise with some options.
    """

    def __init__(
        self, source: str | None = None, *, without: tuple[str, ...] = (), optional: bool = False, **changed: Option
    ) -> None:
        self.source, self.without, self.optional, self.changed = source, without, optional, changed

    def inside(self) -> Fields:
        """The same for a class in this one."""
        return Fields(None, without=self.without, optional=False, **self.changed)


@dataclass(frozen=True)
class Given:
    """Settings of the library as they were given.

    Attributes:
        source: Their class, ``module:Class``.
        values: What each option says, by the name of its field; those of settings in settings stand among them.
        fields: The options' fields.
    """

    source: str
    values: Mapping[str, Any]
    fields: tuple[Field, ...]

    def make(self, n_layers: int | None = None, **known: Any) -> Any:
        """The settings.

        Args:
            n_layers: Layers of the model, which ``layers`` may name.
            known: Fields that no option says.

        Raises:
            PersonaLensError: If a value cannot be read, or the settings refuse it.
        """
        read = dict(known)
        for field in self.fields:
            if field.name in known:
                continue
            if field.inner:
                inside = Given(field.inner, self.values, field.fields)
                read[field.name] = inside.make(n_layers, **field.fixed)
            elif field.name in self.values:
                read[field.name] = _read(field, self.values[field.name], n_layers)
        return resolve_name(self.source)(**read)

    def chosen(self) -> dict[str, Any]:
        """What was given, by field; of settings in settings a dictionary."""
        found: dict[str, Any] = {}
        for field in self.fields:
            if field.inner:
                found[field.name] = Given(field.inner, self.values, field.fields).chosen()
            else:
                found[field.name] = self.values.get(field.name)
        return {name: value for name, value in found.items() if value not in (None, [], {})}


def _read(field: Field, value: Any, n_layers: int | None) -> Any:
    option = "--" + field.name.replace("_", "-")
    if field.kind == "first":
        return tuple(range(value))
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    if field.kind == "layers":
        assert n_layers is not None
        return tuple(layer_numbers(value, n_layers))
    if field.kind == "numbers":
        return tuple(numbers(value, option))
    if field.kind == "whole numbers":
        return whole_numbers(value, option)
    if field.enumeration:
        return choice(resolve_name(field.enumeration), value, option)
    return value


Kind = TypeVar("Kind", bound=StrEnum)
_LAYERS = re.compile(r"\s*([0-9]{1,15})(?:-([0-9]{1,15}))?\s*")


def choice(kind: type[Kind], text: str, option: str) -> Kind:
    """The member of an enumeration that an option names."""
    try:
        return kind(text)
    except ValueError:
        raise PersonaLensError(f"{option} takes {', '.join(kind)}; got {text!r}") from None


def numbers(text: str, option: str) -> list[float]:
    """The numbers in a comma-separated option."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise PersonaLensError(
            f"{option} takes numbers with commas between them, such as 0.5,1,2; got {in_short(text)!r}"
        ) from None


def whole_numbers(text: str, option: str, most: int = 2**32) -> tuple[int, ...]:
    """The whole numbers in a comma-separated option."""
    found = numbers(text, option)
    if not all(number.is_integer() and -most < number < most for number in found):
        raise PersonaLensError(
            f"{option} takes whole numbers with commas between them, such as 0,5,10; got {in_short(text)!r}"
        )
    return tuple(map(int, found))


def layer_numbers(text: str, n_layers: int) -> list[int]:
    """The layers in an option: ``18``, ``12,15,18``, ``10-20`` or ``all``.

    Raises:
        PersonaLensError: If it is none of these, or names a layer that the model does not have.
    """
    if text == "all":
        return list(range(n_layers))
    layers: set[int] = set()
    for part in text.split(","):
        found = _LAYERS.fullmatch(part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise PersonaLensError(f"--layers takes 18, 12,15,18, 10-20 or all; got {in_short(text)!r}")
        if last >= n_layers:
            outside = max(first, n_layers)
            raise PersonaLensError(f"layer {outside} does not exist: the model has layers 0 to {n_layers - 1}")
        layers.update(range(first, last + 1))
    return sorted(layers)


LAYERS = "`18`, `12,15,18`, `10-20` or `all`"
USUAL = {
    "layers": Option(names=("--layers", "--layer"), values=LAYERS),
    "layer": Option(names=("--layer", "--layers")),
    "seed": Option(least=0, most=2**62),
    "reduction": Option(
        values="`response_mean`, `answer_mean`, `thinking_mean`, `prompt_mean` or `prompt_last`",
        shown="response_mean, or answer_mean of a model that thinks",
    ),
    "as_json": Option(names=("--json",)),
}
"""What is the same of an option in every command."""
PANELS = {
    "Run": ("out", "seed", "seeds", "batch_size", "batch_tokens", "dry_run", "preview", "as_json", "allow_other_model"),
    "Responses": ("max_new_tokens", "temperature", "top_p", "thinking_budget"),
    "Model": (
        "backend",
        "backend_option",
        "dtype",
        "device",
        "device_map",
        "trust_remote_code",
        "revision",
        "chat_template",
        "thinking",
        "verify",
    ),
    "Several GPUs or machines": ("ray", "workers", "worker_*"),
    "Remote": ("remote", "request_timeout", "requests_at_once", "store_host"),
    "Users": ("users", "user_*"),
    "Judge": ("judge", "judge_*", "prices", "max_spend"),
}
"""Where options stand in the help, by their parameters; others stand before these."""


Build = Callable[[Mapping[str, Any]], Any]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Let typer see every option of a command: its own, those of its dataclasses, and those of `Given` settings.

    The function is called with the dataclasses and the settings. Its docstring up to ``Args:`` is the help.
    """
    build, taken = _taken(function, Fields())
    taken.sort(key=_is_option)

    @wraps(function)
    def run(**values: Any) -> None:
        build(values)

    run.__doc__ = prose(function.__doc__)
    run.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in taken}
    return run


def _taken(of: Any, shown: Fields) -> tuple[Build, list[inspect.Parameter]]:
    """What calls a function or a dataclass with what options say, and those options."""
    hints, texts = get_type_hints(of, include_extras=True), documented(of)
    builds: dict[str, Build] = {}
    taken: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(of).parameters.items():
        if name in shown.without:
            continue
        kind, *said = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name],)
        own = (each for each in said if isinstance(each, Fields))
        inside = next(own, shown.inside())
        if kind is Given:
            builds[name], options = _settings(inside)
        elif is_dataclass(kind):
            builds[name], options = _taken(kind, inside)
        elif kind is typer.Context:
            builds[name], options = itemgetter(name), [parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=kind)]
        else:
            option = shown.changed.get(name, Option())
            for each in reversed([each for each in said if isinstance(each, Option)]):
                option = option.over(each)
            builds[name] = itemgetter(name)
            options = [_parameter(name, kind, parameter.default, option, texts.get(name))]
        taken += options
    return lambda values: of(**{name: build(values) for name, build in builds.items()}), taken


def _settings(shown: Fields) -> tuple[Build, list[inspect.Parameter]]:
    """What makes settings `Given` of what options say, and those options."""
    assert shown.source is not None
    source, found = shown.source, fields_of(shown.source, shown.without)
    options = []
    for field in _flat(found):
        default, option = field.default, shown.changed.get(field.name, Option())
        if shown.optional:
            option = option.over(Option(shown=None if default in (None, "") else str(default)))
            field, default = replace(field, type=field.type | None), None
        options.append(_parameter(field.name, field.type, default, option.over(Option(values=field.values)), field.doc))
    return lambda values: Given(source, {each.name: values[each.name] for each in options}, found), options


def _flat(fields: tuple[Field, ...]) -> Iterator[Field]:
    for field in fields:
        yield from _flat(field.fields) if field.inner else (field,)


_NONE = re.compile(r"(?s)(.*?)[;.:,] (?:None|null) (?:for |takes |is )?(.*?)\.?")


def _parameter(name: str, kind: Any, default: Any, option: Option, doc: str | None) -> inspect.Parameter:
    """An option as typer takes it."""
    said = option.over(USUAL.get(name, Option()))
    help, shown = said.help or doc or "", said.shown
    if default is None and (found := _NONE.fullmatch(help)):
        help, shown = found[1] + ".", shown or found[2]
    if said.values:
        help = help.rstrip(".")
        help += (". Takes " if set(help) & set(":;.") else ": ") + said.values + "."
    about: dict[str, Any] = {
        "help": help,
        "metavar": said.metavar,
        "show_default": shown or default not in (None, inspect.Parameter.empty),
        "min": said.least,
        "max": said.most,
    }
    if said.argument:
        made: Any = typer.Argument(**about)
    else:
        written = "--" + name.replace("_", "-")
        names = said.names or (f"{written}/--no-{written[2:]}" if default is True or kind == bool | None else written,)
        if said.at_once:
            about |= {"callback": said.at_once, "is_eager": True}
        made = typer.Option(*names, rich_help_panel=_panel(name), **about)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, made])


def _panel(name: str) -> str | None:
    return next((panel for panel, names in PANELS.items() if any(fnmatch(name, each) for each in names)), None)


def _is_option(parameter: inspect.Parameter) -> bool:
    return not any(isinstance(each, ArgumentInfo) for each in getattr(parameter.annotation, "__metadata__", ()))


def given_options(group: Any) -> list[str]:
    """The options of a dataclass that were given, as they are written: those whose field is not None."""
    return ["--" + field.name.replace("_", "-") for field in fields(group) if getattr(group, field.name) is not None]
