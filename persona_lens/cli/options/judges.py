"""The options that choose a judge, and opening it by them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.display import say
from persona_lens.cli.settings import Option, choice, given_options, numbers
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.backend import Backend
    from persona_lens.judging import Judge, Judged
    from persona_lens.models import ChatFormat
    from persona_lens.models.server import CompletionServer
    from persona_lens.vectors import PersonaVectors

LIKELIHOOD = "likelihood"

JudgeName = Annotated[
    str | None,
    Option(
        "Who scores: `likelihood` (the model itself, a proxy), `openai:MODEL` on any OpenAI-compatible server, "
        "`local` (the model reads the rubric) or `local:MODEL`."
    ),
]
SERVER_URL = "The server's address up to `/v1`; or set OPENAI_BASE_URL."
ServerKey = Annotated[
    str | None, Option("Environment variable with the key.", metavar="VARIABLE", shown="OPENAI_API_KEY")
]
Rate = Annotated[str | None, Option("At most so many a minute.", metavar="REQUESTS[,TOKENS]")]
Prices = Annotated[str | None, Option("Dollars for a million tokens read and written.", metavar="IN,OUT")]


@dataclass(frozen=True)
class JudgeOptions:
    """What there is to say of a judge besides which it is.

    Attributes:
        judge_method: How to have a number: `logprobs`, `samples`, `number`, or what the server allows; None for auto.
        judge_at_once: Questions to the judge at the same time; None for 16.
        max_spend: Stop before the judge costs more dollars.
        judge_prefill: What the answer of a local judge begins with, such as `Score: `: small models need it.
        judge_model: Where the model of `likelihood:VECTORS` is, if it came from a folder that is elsewhere; None is by
            its name.
    """

    judge_url: Annotated[str | None, Option(SERVER_URL)] = None
    judge_key: ServerKey = None
    judge_method: str | None = None
    judge_at_once: int | None = None
    judge_rate: Rate = None
    prices: Prices = None
    max_spend: float | None = None
    judge_prefill: str | None = None
    judge_model: Annotated[str | None, Option(metavar="MODEL")] = None

    def open(
        self,
        judge: str | None,
        traits: Judged | Mapping[str, Judged],
        opening: options.ModelOptions,
        subject: tuple[Backend, ChatFormat] | None = None,
    ) -> Any:
        """The judge of a trait, or those of several by their names, which share a server and its limit, or a model.

        Args:
            judge: Which, as it is written; None for none.
            traits: What is judged.
            opening: Says the dtype and the device of a judge that runs here, or the workers that it is spread over.
            subject: The model whose responses are judged; None where there are only responses.

        Raises:
            PersonaLensError: If there is no such judge, or an option is given that it has no use for.

        Returns:
            None for none, and for the likelihood judge of a run, which the engine makes itself.
        """
        from persona_lens.judging import Method
        from persona_lens.judging.registry import Opening, find_judge

        if judge is None:
            self.refuse_useless("none")
            return None
        spec = find_judge(judge, alone=subject is None)
        self.refuse_useless(judge)
        opening = options.ModelOptions(dtype=opening.dtype, device=opening.device, spread=opening.spread)
        makes = spec.open(
            Opening(
                judge.partition(":")[2],
                subject,
                model=lambda model: options.Subject(model, opening=opening.unsteered).open(),
                server=self._server,
                calibrated=lambda path: partial(_likelihood, Path(path), self.judge_model, opening),
                options={**vars(self), "judge_method": choice(Method, self.judge_method or "auto", "--judge-method")},
            )
        )
        if makes is None:
            return None
        return {name: makes(each) for name, each in traits.items()} if isinstance(traits, Mapping) else makes(traits)

    def refuse_useless(self, judge: str) -> None:
        """Raise an error for options that this judge has no use for."""
        from persona_lens.judging.registry import refuse_useless

        refuse_useless(given_options(self), judge)

    def _server(self, model: str) -> CompletionServer:
        return open_server(
            model, self.judge_url, self.judge_key, self.judge_at_once, self.judge_rate, self.prices, self.max_spend
        )


def open_server(
    model: str,
    url: str | None,
    key: str | None,
    at_once: int | None = None,
    rate: str | None = None,
    prices: str | None = None,
    max_spend: float | None = None,
    *,
    rate_option: str = "--judge-rate",
    timeout: float | None = None,
) -> CompletionServer:
    """The server that options describe; nothing is asked of it yet."""
    from persona_lens.models.endpoint import CONCURRENCY, OPENAI_KEY, TIMEOUT
    from persona_lens.models.server import CompletionServer, Prices, ServerSettings, Spending

    limits = _numbers(rate, rate_option, (1, 2))
    charged = _numbers(prices, "--prices", (2,))
    settings = ServerSettings(
        model,
        url,
        key or OPENAI_KEY,
        CONCURRENCY if at_once is None else at_once,
        TIMEOUT if timeout is None else timeout,
        requests_per_minute=limits[0] if limits else None,
        tokens_per_minute=limits[1] if len(limits) > 1 else None,
    )
    spending = Spending(Prices(charged[0], charged[1]) if charged else None, max_spend)
    return CompletionServer(settings, spending=spending)


@contextmanager
def saying_spending(judging: Any) -> Iterator[None]:
    """Say at the end of the work, or where it stops, what the server of a judge, or of several, was asked, if any was.

    Args:
        judging: A judge, or judges of one server by their traits, or None.
    """
    from persona_lens.judging import LLMJudge

    judge = next(iter(judging.values()), None) if isinstance(judging, Mapping) else judging
    try:
        yield
    finally:
        if isinstance(judge, LLMJudge):
            say_usage(judge.server, "judge")


def say_usage(server: CompletionServer, label: str) -> None:
    """Say on standard error what a server was asked and what that cost."""
    spending = server.spending
    cost = f", ${spending.cost:,.4f}" if spending.cost is not None else ""
    say(
        f"{label}: {counted(spending.used.requests, 'answer')} and {spending.cached.requests:,} from the cache, "
        f"{counted(spending.used.tokens, 'token')}{cost}",
        err=True,
    )


def _likelihood(vectors: Path, model: str | None, opening: options.ModelOptions, trait: Judged) -> Judge:
    """The likelihood judge as it was calibrated when vectors were extracted."""
    from persona_lens.judging import LikelihoodJudge

    loaded = options.open_vectors(vectors)
    if loaded.trait_definition.content_hash() != trait.content_hash():
        raise PersonaLensError(f"{vectors} is for the trait {loaded.trait}, or for another version of {trait.name}")
    calibration = loaded.calibration
    backend, chat = options.Subject(model or _place_of(loaded, vectors), opening=opening.unsteered).open()
    loaded.check_model(backend, allowable=False)
    return LikelihoodJudge(backend, chat, trait, calibration)


def _place_of(vectors: PersonaVectors, path: Path) -> str:
    """What opens the vectors' model: its name, or a folder of that name here, beside the vectors or above them."""
    name, revision = vectors.model.model, vectors.model.revision or ""
    if not revision.startswith(("folder:", "adapter:")) or Path(name).exists():
        return name
    found = next((folder / name for folder in path.resolve().parents if (folder / name).is_dir()), None)
    if found is None:
        raise PersonaLensError(
            f"the vectors in {path} were extracted on the model {name!r} in a folder of that name, and there is none "
            "here or beside the vectors; say where it is (--judge-model FOLDER)"
        )
    return str(found)


def _numbers(text: str | None, option: str, allowed: tuple[int, ...]) -> list[float]:
    found = numbers(text, option) if text is not None else []
    if text is not None and len(found) not in allowed:
        raise PersonaLensError(f"{option} takes {' or '.join(map(str, allowed))} numbers, got {text!r}")
    return found
