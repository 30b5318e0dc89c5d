"""Options made from what they set: a command's parameters, dataclasses of options, and settings of the library.

What an option does is said once, in the docstring of what it sets: the `Args:` of a command, the `Attributes:` of a
dataclass, or the text under a pydantic field. Settings of the library are read from their source (`cli/sources.py`),
so that the help of a command imports none of the engine.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from fnmatch import fnmatch
from functools import wraps
from importlib import import_module
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo

from persona_lens.cli.sources import Field, documented, fields_of, prose
from persona_lens.cli.values import choice, layer_numbers, numbers, whole_numbers


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
        module, _, name = self.source.partition(":")
        return getattr(import_module(module), name)(**self.read(n_layers, (*known,)), **known)

    def read(self, n_layers: int | None = None, known: tuple[str, ...] = ()) -> dict[str, Any]:
        """The values that the settings take, by field; of settings in settings the settings."""
        found: dict[str, Any] = {}
        for field in self.fields:
            if field.name in known:
                continue
            if field.inner:
                inside = Given(field.inner, self.values, field.fields)
                found[field.name] = inside.make(n_layers, **field.fixed)
            elif field.name in self.values:
                found[field.name] = _read(field, self.values[field.name], n_layers)
        return found

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
        return value
    if field.kind == "layers":
        assert n_layers is not None
        return tuple(layer_numbers(value, n_layers))
    if field.kind == "numbers":
        return tuple(numbers(value, option))
    if field.kind == "whole numbers":
        return whole_numbers(value, option)
    if field.enumeration:
        module, _, name = field.enumeration.partition(":")
        return choice(getattr(import_module(module), name), value, option)
    return value


LAYERS = "`18`, `12,15,18`, `10-20` or `all`"
USUAL = {
    "layers": Option(names=("--layers", "--layer"), values=LAYERS),
    "layer": Option(names=("--layer", "--layers")),
    "seed": Option(least=0, most=2**62),
    "reduction": Option(values="`response_mean`, `prompt_mean` or `prompt_last`"),
    "as_json": Option(names=("--json",)),
}
"""What is the same of an option in every command."""
PANELS = {
    "Run": ("out", "seed", "seeds", "batch_size", "batch_tokens", "dry_run", "preview", "as_json", "allow_other_model"),
    "Responses": ("max_new_tokens", "temperature", "top_p"),
    "Model": ("backend", "dtype", "device", "device_map", "trust_remote_code", "revision", "chat_template", "thinking"),
    "Remote": ("remote", "request_timeout", "requests_at_once", "store_host"),
    "Judge": ("judge", "judge_*", "prices", "max_spend"),
}
"""Where options stand in the help, by their parameters; others stand before these."""


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Let typer see every option of a command: its own, those of its dataclasses, and those of `Given` settings.

    The function is called with the dataclasses and the settings. Its docstring up to ``Args:`` is the help.
    """
    parts = list(_parts(function))
    taken = [parameter for _, _, parameters in parts for parameter in parameters]
    taken.sort(key=_is_option)

    @wraps(function)
    def run(**values: Any) -> None:
        function(**{name: build(values) for name, build, _ in parts})

    run.__doc__ = prose(function.__doc__)
    run.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in taken}
    return run


Build = Callable[[Mapping[str, Any]], Any]
Part = tuple[str, Build, list[inspect.Parameter]]


def _parts(of: Any, shown: Fields | None = None) -> Iterator[Part]:
    """Each parameter of a function or field of a dataclass: its name, what makes its value, and its options."""
    shown = shown or Fields()
    hints, texts = get_type_hints(of, include_extras=True), documented(of)
    for name, default in _defaults(of):
        if name in shown.without:
            continue
        kind, *said = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name],)
        inside = next((each for each in said if isinstance(each, Fields)), shown.inside())
        if kind is Given:
            yield _settings_part(name, inside)
        elif is_dataclass(kind):
            yield _group_part(name, kind, inside)
        elif kind is typer.Context:
            parameter = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind)
            yield name, _value_of(name), [parameter]
        else:
            option = shown.changed.get(name, Option())
            for each in reversed([each for each in said if isinstance(each, Option)]):
                option = option.over(each)
            yield name, _value_of(name), [_parameter(name, kind, default, option, texts.get(name))]


def _defaults(of: Any) -> Iterator[tuple[str, Any]]:
    if is_dataclass(of):
        yield from (
            (each.name, inspect.Parameter.empty if each.default is MISSING else each.default) for each in fields(of)
        )
    else:
        yield from ((name, each.default) for name, each in inspect.signature(of).parameters.items())


def _value_of(name: str) -> Build:
    return lambda values: values[name]


def _group_part(name: str, kind: Any, shown: Fields) -> Part:
    parts = list(_parts(kind, shown))

    def build(values: Mapping[str, Any]) -> Any:
        return kind(**{field: inner(values) for field, inner, _ in parts})

    return name, build, [parameter for _, _, parameters in parts for parameter in parameters]


def _settings_part(name: str, shown: Fields) -> Part:
    assert shown.source is not None
    source, found = shown.source, fields_of(shown.source, shown.without)

    def flat(inside: tuple[Field, ...]) -> Iterator[Field]:
        for field in inside:
            yield from flat(field.fields) if field.inner else (field,)

    parameters = []
    for field in flat(found):
        default, option = field.default, shown.changed.get(field.name, Option())
        if shown.optional:
            option = option.over(Option(shown=None if default in (None, "") else str(default)))
            field, default = replace(field, type=field.type | None), None
        option = option.over(Option(values=field.values))
        parameters.append(_parameter(field.name, field.type, default, option, field.doc))
    names = [parameter.name for parameter in parameters]
    return name, lambda values: Given(source, {each: values[each] for each in names}, found), parameters


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
