"""Options that several commands share, and opening a model by them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from persona_lens.cli.display import say, say_json
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import read_bytes, write_text
from persona_lens.core.text import counted, in_short
from persona_lens.core.text import without_secrets as shown

if TYPE_CHECKING:
    from persona_lens.backend import Backend
    from persona_lens.models import ChatFormat
    from persona_lens.runs.cost import Work
    from persona_lens.traits import Trait

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Hub id, local folder, or the embedded `smollm2-135m`.", show_default=False),
]
BackendName = Annotated[str, typer.Option("--backend", help="Library to run the model through; see `backends list`.")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="`auto`, `float32`, `bfloat16` or `float16`; auto takes what is fast here.")
]
Device = Annotated[str, typer.Option("--device", help="`auto` or a torch device such as `cuda:1`.")]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.", show_default=False)
]
DeviceMap = Annotated[
    str | None,
    typer.Option("--device-map", help="Spread a large model over devices, such as `auto`.", show_default=False),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the model's repository brings.")
]
Remote = Annotated[
    bool, typer.Option("--remote", help="Run on a server: with `--backend nnsight` the NDIF server in `NDIF_HOST`.")
]
RequestTimeout = Annotated[
    float | None,
    typer.Option("--request-timeout", help="Seconds a remote request may take, queue included.", show_default="3600"),
]
RequestsAtOnce = Annotated[
    int | None,
    typer.Option("--requests-at-once", help="Remote requests under way at the same time.", show_default="4"),
]
StoreHosts = Annotated[
    list[str] | None,
    typer.Option(
        "--store-host",
        metavar="HOST",
        help="Also fetch large results from this host; what it sends can run code here. Repeatable.",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Run nothing: say what would be asked of the model, or sent to a server.")
]
TraitsDirs = Annotated[
    list[Path] | None,
    typer.Option("--traits-dir", metavar="DIR", help="Another folder of trait files. Repeatable.", show_default=False),
]
ChatTemplate = Annotated[
    Path | None,
    typer.Option("--chat-template", metavar="FILE", help="A Jinja chat template to use instead.", show_default=False),
]
Thinking = Annotated[bool, typer.Option("--thinking", help="Let the model reason before it answers.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**62, help="Base of all seeds.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Length limit of a response.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
BatchSize = Annotated[
    int, typer.Option("--batch-size", help="Responses that run at once; halved by itself when memory runs out.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")]


@dataclass(frozen=True)
class ModelOptions:
    """How a model is opened and talked to."""

    backend: BackendName = "transformers"
    dtype: Dtype = "auto"
    device: Device = "auto"
    device_map: DeviceMap = None
    trust_remote_code: TrustRemoteCode = False
    revision: Revision = None
    remote: Remote = False
    request_timeout: RequestTimeout = None
    requests_at_once: RequestsAtOnce = None
    store_host: StoreHosts = None
    chat_template: ChatTemplate = None
    thinking: Thinking = False

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
    for note in chat.notes:
        say(f"note: {note}", err=True)
    return chat


def open_trait(trait: str, traits_dirs: Sequence[Path]) -> Trait:
    """A trait by its name or path, with what is wrong with files of that name said on standard error."""
    from persona_lens.traits import find_traits, is_path, load_trait

    loaded = load_trait(trait, traits_dirs)
    if not is_path(trait):
        for warning in find_traits(traits_dirs).warnings([trait]):
            say(f"warning: {warning}", err=True)
    return loaded


REPORT = "report.html"  # in the folder of a run


def write_report(file: Path, page: str) -> None:
    """Write a report: all of it, or nothing; one that is there as it would be written stays."""
    if not (file.is_file() and read_bytes(file) == page.encode()):
        write_text(file, page)


def run_folder(what: str, model: str) -> Path:
    """Where a run is kept unless `--out` says otherwise."""
    return Path("runs") / f"{what}-{model.replace('/', '--')}"


def repeated(context: typer.Context) -> str:
    """The command under way, as one types it to have the same again: what was given to it, but for ``--json``."""
    words = context.command_path.split()
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is None or source.name != "COMMANDLINE" or "--json" in parameter.opts:
            continue
        value = context.params[parameter.name or ""]
        if parameter.param_type_name == "argument":
            words.append(shown(value))
        elif isinstance(value, bool):
            words.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            words += [parameter.opts[0], shown(value)]
    return shlex.join(words)


def planned(work: Callable[[], Sequence[Work]], opening: ModelOptions, dry_run: bool, as_json: bool) -> bool:
    """Show what a run would ask for, if that is all that is wanted; say what it will send to a server, if it will.

    Args:
        work: Counts it; asked only where it is to be said.
        opening: Where the model is.
        dry_run: Whether this is all that is wanted.
        as_json: Whether to show it as JSON.

    Returns:
        True if the command is to end here.
    """
    if dry_run:
        show_work(work(), as_json)
    elif opening.remote:
        say_plan(work())
    return dry_run


def say_plan(work: Sequence[Work]) -> None:
    """Say on standard error what a run will send to a server; nothing for a model that is here."""
    planned = [each.traffic for each in work if each.traffic]
    if planned:
        total = sum(planned[1:], planned[0])
        up, down = total.bytes_up / 1e6, total.bytes_down / 1e6
        say(f"plan: {counted(total.requests, 'request')}, {up:,.2f} MB up, at most {down:,.2f} MB down", err=True)


def show_work(work: Sequence[Work], as_json: bool, *, asked: str = "batches") -> None:
    """What a run would ask, as a table or as JSON; ``asked`` is what it is asked in where the model is here."""
    if as_json:
        say_json({"work": [asdict(each) for each in work]})
        return
    from persona_lens.cli.display import print_table

    remote, paid = any(each.traffic for each in work), any(each.cost is not None for each in work)
    columns: tuple[str, ...] = ("", "requests" if remote else asked, "texts", "tokens at most")
    print_table(
        "What the run asks for, if every response is as long as it may be",
        (*columns, *(("MB up", "MB down at most") if remote else ()), *(("dollars at most",) if paid else ())),
        [_work_row(each, remote, paid) for each in work],
    )


def say_traffic(backend: Backend) -> None:
    """Say on standard error what a run sent to a server; nothing for a model that is here."""
    from persona_lens.backend.protocol import RemoteBackend

    if isinstance(backend, RemoteBackend):
        made = backend.traffic
        up, down = made.bytes_up / 1e6, made.bytes_down / 1e6
        say(f"server: {counted(made.requests, 'request')}, {up:,.2f} MB up, {down:,.2f} MB down", err=True)


def _work_row(work: Work, remote: bool, paid: bool) -> tuple[str, ...]:
    amounts = [work.label, f"{work.requests:,}", f"{work.rows:,}", f"{work.tokens:,}"]
    if remote:
        sizes = (work.traffic.bytes_up, work.traffic.bytes_down) if work.traffic else ()
        amounts += [f"{size / 1e6:,.1f}" for size in sizes] or ["-", "-"]
    if paid:
        amounts.append("-" if work.cost is None else f"{work.cost:,.2f}")
    return tuple(amounts)


Kind = TypeVar("Kind", bound=StrEnum)


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


_LAYERS = re.compile(r"\s*([0-9]{1,15})(?:-([0-9]{1,15}))?\s*")
