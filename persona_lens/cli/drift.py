"""``persona-lens monitor drift``: where replies stand along traits while conversations go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.display import Column, interval_text, say, show_rows
from persona_lens.cli.options.judges import SERVER_URL, Prices, ServerKey, open_server, say_usage
from persona_lens.cli.options.steerings import SteeringOptions
from persona_lens.cli.runner import Job, Run, Session
from persona_lens.cli.settings import Fields, Given, Option, given_options
from persona_lens.core.errors import PersonaLensError

if TYPE_CHECKING:
    from persona_lens.data.scripted import Scripted
    from persona_lens.monitoring import Drift
    from persona_lens.monitoring.drift.simulated_user import UserModel

SERVER = "openai:"
TIMEOUT = 300.0  # seconds for one message: a large model on a slow machine writes a few tokens a second
THERE = ("--user-url", "--user-key", "--user-prices", "--user-max-spend")  # what a model that runs here has no use for

MOST_NAMED = 3  # traits in the name of a folder


@dataclass(frozen=True)
class UserOptions:
    """Who talks with the model.

    Attributes:
        users: A file of people with their messages, YAML. Repeatable; None for the built-in ones.
        user_model: Let a model play them: `openai:NAME` on any OpenAI-compatible server, or a model that runs here.
        user_tokens: Length limit of its messages; None for 80.
        user_temperature: Of its messages, 0 is greedy; None for 1.
        user_max_spend: Stop before it costs more dollars.
    """

    users: Annotated[list[Path] | None, Option(metavar="FILE")] = None
    user_model: Annotated[str | None, Option(metavar="MODEL")] = None
    user_tokens: Annotated[int | None, Option(least=1)] = None
    user_temperature: float | None = None
    user_url: Annotated[str | None, Option(SERVER_URL)] = None
    user_key: ServerKey = None
    user_prices: Prices = None
    user_max_spend: float | None = None

    def check(self) -> None:
        """Raise an error for options that the users, or the model that plays them, have no use for."""
        given, model = set(given_options(self)) - {"--users", "--user-model"}, self.user_model
        if given and model is None:
            what = ", ".join(sorted(given))
            raise PersonaLensError(f"{what}: for a model that plays the users; name one with --user-model")
        if model is not None and not model.removeprefix(SERVER).strip():
            raise PersonaLensError("--user-model needs a model: openai:NAME, a hub id, a local folder or smollm2-135m")
        useless = sorted(given.intersection(THERE))
        if model is not None and useless and not model.startswith(SERVER):
            raise PersonaLensError(f"{', '.join(useless)}: only for --user-model openai:NAME, this is {model!r}")

    def people(self) -> tuple[Scripted, ...]:
        """Who talks."""
        from persona_lens.data.scripted import scripted_users

        return scripted_users(self.users or ())

    def open(self, at: Session, run: Run) -> UserModel | None:
        """The model that plays them; the one that is talked with if that is named. None where they follow scripts."""
        from persona_lens.models.chat import chat_format
        from persona_lens.monitoring.drift.simulated_user import LocalUser, ServerUser
        from persona_lens.runs.settings import RolloutSettings

        if self.user_model is None:
            return None
        said = {"max_new_tokens": self.user_tokens or 80, "temperature": self.user_temperature}
        settings = RolloutSettings(**{name: value for name, value in said.items() if value is not None})  # type: ignore[arg-type]
        if self.user_model.startswith(SERVER):
            name, paid = self.user_model.removeprefix(SERVER), (self.user_prices, self.user_max_spend)
            server = open_server(name, self.user_url, self.user_key, prices=paid[0], max_spend=paid[1], timeout=TIMEOUT)
            if not run.dry_run:
                server.check()
            return ServerUser(server, settings)
        if self.user_model == run.model:
            return LocalUser(at.backend, chat_format(at.backend), settings)  # who need not think for a short message
        opening = options.ModelOptions(dtype=run.opening.dtype, device=run.opening.device, spread=run.opening.spread)
        return LocalUser(
            *options.Subject(self.user_model, opening=opening.unsteered).open(offline=run.dry_run), settings
        )


def drift_command(
    run: Annotated[Run, Fields(without=("judge", "judging"), out=Option(shown="runs/drift-TRAIT-MODEL"))],
    traits: options.TraitsRead,
    who: UserOptions,
    written: SteeringOptions,
    given: Annotated[Given, Fields("persona_lens.monitoring:DriftSettings")],
) -> None:
    """Hold conversations of several turns, and see how far replies move along traits.

    Forty people talk with the model, from four domains (coding, writing, therapy, philosophy). Means turn by turn come
    with 95% intervals over conversations, and with the turn at which a change sets in; what is said of it is held
    against random directions. A regression says how far the user's messages foretell where the next reply stands. With
    `--edits` the same messages are said again under a steering.

    Example: `persona-lens monitor drift smollm2-135m runs/tuned-optimistic --edits "optimistic@18:floor(0)"`
    """
    from persona_lens.monitoring import drift
    from persona_lens.monitoring.drift.messages import check_regression
    from persona_lens.monitoring.drift.plan import plan_drift

    who.check()
    check_regression()  # known before a model is loaded
    loaded, chosen = traits.open()
    settings, users = given.make(loaded[0].model.n_layers), who.people()
    steerings = written.open(*loaded)

    def asked(at: Session) -> dict[str, Any]:
        named = {"layers": chosen, "users": users, "user_model": at.read, "steerings": steerings, "chat": at.chat}
        return {**named, "allow_other_model": traits.allow_other_model}

    def held(at: Session) -> Drift:
        with _saying_usage(at.read):
            return drift(at.backend, loaded, settings, folder=at.folder, progress=at.given["progress"], **asked(at))

    names = [each.trait for each in loaded]
    named = "-".join(names if len(names) <= MOST_NAMED else [names[0], "and", str(len(names) - 1), "more"])
    job = Job(
        held,
        _show_drift,
        lambda at: plan_drift(at.backend, loaded, settings, **asked(at)).work(),
        name=f"drift-{named}",
        model=loaded[0].model.model,
        read=lambda at: who.open(at, run),
    )
    run.carry_out(job)


@contextmanager
def _saying_usage(user: UserModel | None) -> Iterator[None]:
    """Say at the end of the work, or where it stops, what the server that plays the users was asked, if one does."""
    from persona_lens.monitoring.drift.simulated_user import ServerUser

    try:
        yield
    finally:
        if isinstance(user, ServerUser):
            say_usage(user.server, "users")


def _show_drift(found: Drift, _: Session) -> None:
    from persona_lens.reports.drift import MESSAGES, told

    last = found.summary["counts"]["turns"]
    for gauge in found.summary["gauges"]:
        show_rows(
            f"{gauge['name']}: mean projection of the replies, and its change since turn 1 [95% interval]",
            list(gauge["movement"].items()),
            {
                "conversations": lambda row: row[0],
                "turn 1": _interval(".2f", "means", 0),
                f"turn {last}": _interval(".2f", "means", -1),
                "change": _interval("+.2f", "changes", -1),
                "from turn": lambda row: row[1]["onset"],
                "in SDs": (lambda row: row[1]["size"], "+.2f"),
                "random": (lambda row: row[1]["random_size"], ".2f"),
                "verdict": lambda row: row[1]["verdict"],
            },
        )
        _show_messages(gauge["name"], {MESSAGES[name]: each for name, each in gauge["messages"].items()})
        for way, each in gauge["replays"].items():
            columns: dict[str, Column[Any]] = {
                "conversations": lambda row: row[0],
                "change": _interval("+.2f", "movement", "changes", -1),
                "change beside unsteered": _interval("+.2f", "drift", "vector"),
                "random": _interval("+.2f", "drift", "random"),
                "all turns beside unsteered": _interval("+.2f", "level", "vector"),
            }
            show_rows(f"{gauge['name']} under {way}", list(each.items()), columns)
    for line in told(found.summary):
        say(line)


def _interval(form: str, *path: str | int) -> Column[Any]:
    """What a column holds of a name and its values: a number with its interval, found along a path, or a dash."""

    def shown(row: tuple[str, Any]) -> str:
        found = row[1]
        for part in path:
            found = None if found is None else found[part]
        return interval_text(found, form, noun=None)

    return shown


def _show_messages(gauge: str, targets: dict[str, Any]) -> None:
    known = [(name, each) for name, each in targets.items() if "reason" not in each]
    if known:
        show_rows(
            f"{gauge}: how well user messages foretell it, R2 on other conversations [95% interval]",
            known,
            {
                "of the next reply": lambda row: row[0],
                "R2": _interval(".2f", "r2"),
                "shuffled": _interval(".2f", "shuffled"),
                "shuffled within domain and turn": _interval(".2f", "shuffled_within"),
                "verdict": lambda row: row[1]["verdict"],
            },
        )
