"""Options that several commands share, and opening a model by them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli.display import say
from persona_lens.cli.settings import Option, argument
from persona_lens.cli.values import layer_numbers
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import without_secrets

if TYPE_CHECKING:
    from persona_lens.backend import Backend
    from persona_lens.models import ChatFormat
    from persona_lens.traits import Trait
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
OneLayer = Annotated[int | None, Option("Layer of the vector, counted from 0.", shown="the tuned one")]
Reduction = Annotated[str, Option("Which of the vectors.")]
MaxNewTokens = Annotated[int, Option("Length limit of a response.")]
Temperature = Annotated[float, Option("0 is greedy.")]
Seed = Annotated[int, Option("Base of all seeds.")]
BatchSize = Annotated[int, Option("Responses that run at once; halved by itself when memory runs out.")]
Dtype = Annotated[str, Option("`auto`, `float32`, `bfloat16` or `float16`; auto takes what is fast here.")]
Device = Annotated[str, Option("`auto` or a torch device such as `cuda:1`.")]
Backends = Annotated[str, Option("Library to run the model through; see `backends list`.")]
Revision = Annotated[str | None, Option("Branch, tag or commit of a hub model.")]
DryRun = Annotated[bool, Option("Run nothing: say what would be asked of the model, or sent to a server.")]
Preview = Annotated[bool, Option("Generate nothing: show token by token what would be read and edited.")]
Out = Annotated[Path | None, Option("Run folder; kept and resumed.")]
AsJson = Annotated[bool, Option("Write JSON to standard output.")]
TraitsDirs = Annotated[list[Path] | None, Option("Another folder of trait files. Repeatable.", metavar="DIR")]
System = Annotated[str | None, Option("System prompt.")]


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
    """

    backend: Backends = "transformers"
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

    def open(self, model: str, *, offline: bool = False) -> Backend:
        """Open the model; ``offline`` asks no server, for dry runs."""
        return open_model(
            model,
            self.backend,
            revision=self.revision,
            dtype=self.dtype,
            device=self.device,
            device_map=self.device_map,
            trust_remote_code=self.trust_remote_code,
            remote=self.remote,
            request_timeout=self.request_timeout,
            requests_at_once=self.requests_at_once,
            store_hosts=self.store_host,
            offline=self.remote and offline,
        )

    def chat(self, backend: Backend) -> ChatFormat:
        """The model's chat format."""
        return open_chat(backend, self.chat_template, self.thinking)


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
        backend = self.opening.open(self.model, offline=offline)
        return backend, self.opening.chat(backend)


def open_model(model: str, backend: str, *, revision: str | None, **given: object) -> Backend:
    """Open a model with only the options that were given, so that a backend without one of them can say so."""
    from persona_lens.backend import open_backend
    from persona_lens.cli.display import quiet_libraries, show_status, showing_progress
    from persona_lens.models import resolve

    quiet_libraries()
    with showing_progress(of_bytes=True) as progress:
        resolve(model, revision, progress=progress, weights=not given.get("remote"))
    options: dict[str, Any] = {"revision": revision, **given}
    if given.get("remote"):
        options["on_status"] = show_status
    return open_backend(
        backend, model, **{name: value for name, value in options.items() if value not in (None, False, [])}
    )


def open_chat(backend: Backend, template: Path | None, thinking: bool) -> ChatFormat:
    """The model's chat format, with what is surprising about it said on standard error."""
    from persona_lens.models import ChatFormat

    try:
        text = template.read_text(encoding="utf-8") if template else None
    except (OSError, UnicodeDecodeError) as error:
        raise PersonaLensError(f"cannot read the chat template {template}: {error}") from error
    chat = ChatFormat.from_tokenizer(backend.tokenizer, template=text, thinking=thinking)
    say_notes(chat.notes)
    return chat


def open_trait(trait: str, traits_dirs: Sequence[Path]) -> Trait:
    """A trait by its name or path, with what is wrong with files of that name said on standard error."""
    from persona_lens.traits import find_traits, is_path, load_trait

    loaded = load_trait(trait, traits_dirs)
    if not is_path(trait):
        say_notes(find_traits(traits_dirs).warnings([trait]), "warning")
    return loaded


def open_vectors(paths: Sequence[Path]) -> list[PersonaVectors]:
    """Several vectors."""
    from persona_lens.vectors import load_vectors

    return [load_vectors(path) for path in paths]


def open_layers(paths: Sequence[Path], layers: str | None) -> tuple[list[PersonaVectors], list[int] | None]:
    """Several vectors, and the layers of their model that were named, if any were."""
    loaded = open_vectors(paths)
    return loaded, layer_numbers(layers, loaded[0].model.n_layers) if layers else None


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
            words += [parameter.opts[0], without_secrets(value)]
    return shlex.join(words)


def was_given(context: typer.Context, name: str) -> bool:
    """Whether an option or argument stood in the command."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
