"""Options that several commands share, and opening a model by them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli.display import quiet_libraries, say, show_status, showing_progress
from persona_lens.cli.options.ray import RayOptions
from persona_lens.cli.settings import Fields, Option, argument, layer_numbers
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import in_short, without_secrets

if TYPE_CHECKING:
    from persona_lens.backend import Backend
    from persona_lens.models import ChatFormat
    from persona_lens.traits import DefinitionFile, Trait, TraitFile
    from persona_lens.traits.kind import Content, Kind
    from persona_lens.vectors import PersonaVectors

Model = Annotated[str, argument("MODEL", "Hub id, local folder, or the embedded `smollm2-135m`.")]
Vectors = Annotated[Path, argument("VECTORS", "A vectors.safetensors, or the run folder it is in.")]
SeveralVectors = Annotated[
    list[Path], argument("VECTORS...", "A vectors.safetensors, or the run folder it is in; one a trait.")
]
TraitName = Annotated[str, argument("TRAIT", "A trait's name, or the path of its YAML file.")]
AllowOtherModel = Annotated[bool, Option("Use the vectors on a model that they were not extracted from.")]
Layers = Annotated[str, Option("Layers.")]
PanelLayers = Annotated[str | None, Option("Layers at which each trait is read.", shown="where each was tuned")]
Reduction = Annotated[str, Option("Which of the vectors.")]
MaxNewTokens = Annotated[int, Option("Length limit of a response.")]
Temperature = Annotated[float, Option("0 is greedy.")]
ThinkingBudget = Annotated[
    int | None, Option("How many tokens a model may think before it has to answer.", shown="no limit")
]
Seed = Annotated[int, Option("Base of all seeds.")]
BatchSize = Annotated[int, Option("Responses that run at once; halved by itself when memory runs out.")]
Dtype = Annotated[str, Option("`auto`, `float32`, `bfloat16` or `float16`; auto takes what is fast here.")]
Device = Annotated[str, Option("`auto` or a torch device such as `cuda:1`.")]
Backends = Annotated[str, Option("Library to run the model through; see `backends list`.")]
BackendOptions = Annotated[
    list[str] | None,
    Option("An option of the backend's own, such as `max_model_len=4096`. Repeatable.", metavar="NAME=VALUE"),
]
Revision = Annotated[str | None, Option("Branch, tag or commit of a hub model.")]
DryRun = Annotated[bool, Option("Run nothing: say what would be asked of the model, or sent to a server.")]
Preview = Annotated[bool, Option("Generate nothing: show token by token what would be read and edited.")]
Out = Annotated[Path | None, Option("Run folder; kept and resumed.")]
AsJson = Annotated[bool, Option("Write JSON to standard output.")]
TraitsDirs = Annotated[list[Path] | None, Option("Another folder of trait files. Repeatable.", metavar="DIR")]
RoleName = Annotated[str, argument("ROLE", "A role's name, or the path of its YAML file.")]
RolesDirs = Annotated[list[Path] | None, Option("Another folder of role files. Repeatable.", metavar="DIR")]
System = Annotated[str | None, Option("System prompt.")]


NOT_OF_BACKENDS = ("backend", "backend_option", "store_host", "chat_template", "thinking", "verify", "spread")


@dataclass
class _Held:
    """A model that several commands in this process share, how it was opened, and whether its edits were tried."""

    model: str
    opened: tuple[tuple[str, str], Backend] | None = None
    verified: bool = False


_HELD: ContextVar[_Held | None] = ContextVar("the model that is held open", default=None)


@contextmanager
def holding_open(model: str) -> Iterator[None]:
    """Within it commands that open this model share it, for as long as they open it alike."""
    token = _HELD.set(_Held(model))
    try:
        yield
    finally:
        _HELD.reset(token)


@dataclass(frozen=True)
class ModelOptions:
    """How a model is opened and talked to.

    Attributes:
        device_map: Spread a large model over devices, such as `auto`.
        trust_remote_code: Run code that the model's repository brings.
        remote: Run on a server: with `--backend nnsight` the NDIF server in `NDIF_HOST`.
        request_timeout: Seconds a remote request may take, queue included; None for 3600.
        requests_at_once: Remote requests under way at the same time; None for 4.
        store_host: Also fetch large results from this host; what it sends can run code here. Repeatable.
        chat_template: A Jinja chat template to use instead.
        thinking: Let the model reason before it answers.
        verify: Make sure that edits act before anything runs; None for engines and servers alone.
        spread: Over which processes, if not in this one.
    """

    backend: Backends = "transformers"
    backend_option: BackendOptions = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    device_map: str | None = None
    trust_remote_code: bool = False
    revision: Revision = None
    remote: bool = False
    request_timeout: float | None = None
    requests_at_once: int | None = None
    store_host: Annotated[list[str] | None, Option(metavar="HOST")] = None
    chat_template: Annotated[Path | None, Option(metavar="FILE")] = None
    thinking: bool = False
    verify: bool | None = None
    spread: RayOptions = field(default_factory=RayOptions)

    def __post_init__(self) -> None:
        if self.remote and self.spread.ray is not None:
            raise PersonaLensError("--ray spreads a model over processes; with --remote it runs on a server already")
        own_options(self.backend_option)  # what cannot be read is to be known before anything runs

    def open(self, model: str, *, offline: bool = False) -> Backend:
        """Open the model with only the options that were given, so that a backend without one of them can say so.

        Args:
            model: Its name.
            offline: Ask no server, for dry runs, and no more than one worker.
        """
        from persona_lens.backend import open_backend
        from persona_lens.models import resolve

        quiet_libraries()
        with showing_progress(of_bytes=True) as progress:
            resolve(model, self.revision, progress=progress, weights=not (self.remote or self.spread.elsewhere))
        usual = {each.name: each.default for each in fields(self) if each.name not in NOT_OF_BACKENDS}
        given = {name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}
        given |= {"chat_template": self.template(), "store_hosts": self.store_host, "offline": self.remote and offline}
        given |= {"on_status": show_status if self.remote else None}
        kept = {name: value for name, value in given.items() if value not in (None, False, [])}
        kept |= own_options(self.backend_option)
        opened_by = open_backend if self.spread.ray is None else self.spread.started(one=offline).open
        held = _HELD.get()
        if held is None or model != held.model or self.spread.ray is not None:
            held = _Held(model)
        asked = (self.backend, repr(sorted(kept.items(), key=str)))
        if held.opened is None or held.opened[0] != asked:
            held.opened, held.verified = None, False  # another way to open it: one at a time is in memory
            held.opened = asked, opened_by(self.backend, model, **kept)
        opened = held.opened[1]
        if not (offline or held.verified):
            held.verified = self._verify(opened)
        return opened

    @property
    def unsteered(self) -> ModelOptions:
        """The same for a model that is never edited: whether edits act need not be tried."""
        return replace(self, verify=False)

    def _verify(self, backend: Backend) -> bool:
        """Whether it was tried that edits act; raise `VerificationError` if they do not, where that is wanted."""
        if self.verify is not False:
            from persona_lens.backend.verification import is_engine, verify

            if self.verify or is_engine(backend):
                verify(backend)
                return True
        return False

    def chat(self, backend: Backend) -> ChatFormat:
        """The model's chat format, with what is surprising about it said on standard error."""
        from persona_lens.models import ChatFormat

        chat = ChatFormat.from_tokenizer(backend.tokenizer, thinking=self.thinking)
        say_notes(chat.notes)
        return chat

    def template(self) -> str | None:
        """The text of the chat template that was named, if one was."""
        try:
            return self.chat_template.read_text(encoding="utf-8") if self.chat_template else None
        except (OSError, UnicodeDecodeError) as error:
            raise PersonaLensError(f"cannot read the chat template {self.chat_template}: {error}") from error


def own_options(texts: Sequence[str] | None) -> dict[str, Any]:
    """What `--backend-option` says, by name: numbers, truth values and texts as YAML reads them.

    Raises:
        PersonaLensError: If a text is no option with a value, or names one that is given already or otherwise.
    """
    from persona_lens.core.documents import DocumentError, parse_yaml

    others = {each.name: "--" + each.name.replace("_", "-") for each in fields(ModelOptions)}
    others |= {"store_hosts": "--store-host", "offline": "--dry-run", "on_status": "--remote"}
    found: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not (equals and name.isidentifier() and value.strip()):
            raise PersonaLensError(
                f"--backend-option takes NAME=VALUE, such as max_model_len=4096; got {in_short(text)!r}"
            )
        if name in others:
            raise PersonaLensError(f"--backend-option {in_short(text)!r}: {name} is what {others[name]} says; use that")
        if name in found:
            raise PersonaLensError(f"--backend-option {name} is given twice")
        try:
            found[name] = parse_yaml(value)
        except DocumentError as error:
            raise PersonaLensError(f"the value of --backend-option {in_short(text)!r} is {error}") from error
    return found


PLACES = ("dtype", "device", "spread")
Placement = Annotated[
    ModelOptions, Fields(without=tuple(each.name for each in fields(ModelOptions) if each.name not in PLACES))
]
Here = Fields(without=("spread",))
"""For models of commands that need them in this process, or ask them one thing after the other."""


@dataclass(frozen=True)
class Subject:
    """The model that a command is about.

    Attributes:
        model: Its name.
        as_json: Whether the command says what it found as JSON.
        opening: How it is opened.
    """

    model: Model
    as_json: AsJson = False
    opening: ModelOptions = field(default_factory=ModelOptions)

    def open(self, *, offline: bool = False) -> tuple[Backend, ChatFormat]:
        """The model and its chat format."""
        self.opening.template()  # one that cannot be read is to be known before a model is loaded
        backend = self.opening.open(self.model, offline=offline)
        return backend, self.opening.chat(backend)


def open_trait(trait: str, traits_dirs: Sequence[Path] | None) -> Trait:
    """A trait by its name or path, with what is wrong with files of that name said on standard error."""
    return find_trait(trait, traits_dirs).read()


def find_trait(trait: str, traits_dirs: Sequence[Path] | None) -> TraitFile:
    """As `open_trait`, the file that defines it."""
    from persona_lens.traits.schema import TRAITS

    return find_file(TRAITS, trait, traits_dirs)


def find_file(kind: Kind[Content], name: str, folders: Sequence[Path] | None) -> DefinitionFile[Content]:
    """The file of a trait or a role by its name or path; what is wrong with that name is said on standard error."""
    from persona_lens.traits.discovery import file_at, find, is_path

    if is_path(name):
        return file_at(name, kind)
    catalogue = find(kind, folders or ())
    file = catalogue.find(name)
    say_notes(catalogue.warnings([name]), "warning")
    return file


def open_vectors(path: Path) -> PersonaVectors:
    """The vectors in a file or a run folder."""
    from persona_lens.vectors import load_vectors

    return load_vectors(path)


def open_by_trait(paths: Sequence[Path]) -> dict[str, PersonaVectors]:
    """Several vectors by their traits.

    Raises:
        PersonaLensError: If two are of one trait.
    """
    found: dict[str, PersonaVectors] = {}
    places: dict[str, Path] = {}
    for path in paths:
        each = open_vectors(path)
        if each.trait in found:
            raise PersonaLensError(f"{places[each.trait]} and {path} are both of {each.trait!r}; give each trait once")
        found[each.trait], places[each.trait] = each, path
    return found


@dataclass(frozen=True)
class TraitsRead:
    """Vectors whose traits are read together, each at some layers."""

    vectors: SeveralVectors
    layers: PanelLayers = None
    allow_other_model: AllowOtherModel = False

    def open(self) -> tuple[list[PersonaVectors], list[int] | None]:
        """The vectors, and the layers of their model that were named, if any were."""
        loaded = list(map(open_vectors, self.vectors))
        return loaded, layer_numbers(self.layers, loaded[0].model.n_layers) if self.layers else None


def say_notes(notes: Sequence[str], kind: str = "note") -> None:
    """Say notes or warnings on standard error."""
    for note in notes:
        say(f"{kind}: {note}", err=True)


def run_folder(what: str, model: str) -> Path:
    """Where a run is kept unless `--out` says otherwise."""
    return Path("runs") / f"{what}-{model.replace('/', '--')}"


def repeated(context: typer.Context) -> str:
    """The command under way, as one types it to have the same again: what was given to it, but for ``--json``."""
    words = context.command_path.split()
    for parameter in context.command.params:
        if not was_given(context, parameter.name or "") or "--json" in parameter.opts:
            continue
        value = context.params[parameter.name or ""]
        if parameter.param_type_name == "argument":
            words.append(without_secrets(value))
        elif isinstance(value, bool):
            words.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            for each in value if isinstance(value, list | tuple) else [value]:
                words += [parameter.opts[0], without_secrets(each)]
    return shlex.join(words)


def was_given(context: typer.Context, name: str) -> bool:
    """Whether an option or argument stood in the command."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
