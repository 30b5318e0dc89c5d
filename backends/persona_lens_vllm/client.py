"""`VllmServer`: a ``vllm serve`` of somebody's own, used as a backend over its OpenAI API. Needs no vLLM here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, TypeVar

import httpx
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from persona_lens.backend import (
    BackendError,
    Edit,
    Edits,
    ForwardResult,
    Generation,
    ModelInfo,
    Read,
    Sampling,
    TokenBatch,
    as_edits,
)
from persona_lens.backend.batches import check_fits, check_request
from persona_lens.backend.blocks import text_config
from persona_lens.backend.edits import edits_of_rows
from persona_lens.backend.parts import Parts
from persona_lens.backend.parts.asked import ask_parts, limited_for, parts_for
from persona_lens.backend.parts.table import Markup
from persona_lens.backend.protocol import RemoteError
from persona_lens.backend.sinks import NORMS, depend_on_sinks, limits_from, probe
from persona_lens.backend.tokens import cut_response
from persona_lens.core.text import in_short
from persona_lens.core.threads import in_threads
from persona_lens.core.transport import MIB, BoundedClient, Bounds
from persona_lens.models import end_of_turn_ids, load_tokenizer, pinned, resolve
from persona_lens.models.endpoint import OPENAI_KEY, ServerSettings
from persona_lens_vllm.call import noises_of
from persona_lens_vllm.tags import ORDER, TAG
from persona_lens_vllm.wire import MOST_NUMBERS, TOLD, VERSION, RowOrder, tensor_from

MADE_WITH = (
    "--enforce-eager --worker-extension-cls persona_lens_vllm.worker.ResidualStream "
    "--logits-processors persona_lens_vllm.sampler:SeededRows --middleware persona_lens_vllm.serving.Orders"
)
# A server has defaults of its own for whatever is not said, often those of the model's generation_config.json.
_NEUTRAL = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
    "ignore_eos": True,  # the ids that end a response are named
    "return_token_ids": True,
}
Piece = TypeVar("Piece")
Taken = TypeVar("Taken")


class VllmServer:
    """A backend whose model is run by a ``vllm serve`` with `persona_lens_vllm.serving.Orders`.

    Each row is a request of its own, and vLLM makes batches of those that are under way.

    Args:
        base_url: The server's address, such as ``http://127.0.0.1:8000``.
        model: The model's hub id, folder or embedded name: its tokenizer and its configuration are needed here.
        served_as: The model's name on the server; None for the first that it names.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Run code that the model's repository brings.
        chat_template: The text of a chat template instead of the tokenizer's.
        key_variable: The environment variable that holds the server's key, if it wants one.
        timeout: Seconds that a row may take, the time in which it waits for its turn included.
        requests_at_once: How many requests of a call may be under way at the same time.

    Raises:
        RemoteError: If the server cannot be reached, takes no orders, or runs another model.
        ModelError: If the tokenizer or the configuration cannot be loaded.
        ServerError: If the address is none, or the key is missing.
    """

    shares_prompts = False
    calls_at_once = 8  # as many batches as a server needs to be full while others end

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        served_as: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        chat_template: str | None = None,
        key_variable: str = OPENAI_KEY,
        timeout: float = 600.0,
        requests_at_once: int = 64,
    ) -> None:
        if timeout <= 0 or requests_at_once < 1:
            raise RemoteError("timeout must be above 0 and requests_at_once at least 1")
        address = base_url.rstrip("/")
        settings = ServerSettings(model, address if address.endswith("/v1") else address + "/v1", key_variable)
        self._shown, self._key_variable, self._at_once = settings.shown, key_variable, requests_at_once
        # Numbers travel as base64 of four bytes each, and a request's own texts are returned beside them.
        bounds = Bounds(timeout, 6 * MOST_NUMBERS + 64 * MIB)
        headers = {"Authorization": f"Bearer {settings.key()}"}
        self._client = BoundedClient(bounds, base_url=settings.url, headers=headers, follow_redirects=False)
        source = pinned(resolve(model, revision, weights=False))
        where: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": source.is_local}
        if source.revision is not None:
            where["revision"] = source.revision
        own: dict[str, Any] = {"trust_remote_code": trust_remote_code, "chat_template": chat_template}
        self.tokenizer = load_tokenizer(source, **own)
        self._config = AutoConfig.from_pretrained(source.location, **where)
        try:
            generation = GenerationConfig.from_pretrained(source.location, **where)
        except OSError:  # it has none
            generation = None
        self.end_ids = end_of_turn_ids(self.tokenizer, generation)
        here = {"model": source.id, "revision": source.identity, "device": "remote", "remote": True}
        found = self._ask("GET", "/models")
        facts = self._facts(found)
        self._served_as = served_as or _taken(lambda: str(found["data"][0]["id"]), self._shown)
        self._vocabulary = _taken(lambda: int(facts["vocabulary"]), self._shown)
        self.context_length = _taken(lambda: int(facts["context_length"]), self._shown) - 1
        told = {name: facts.get(name) for name in TOLD}
        self.info = _taken(lambda: ModelInfo.from_json({**told, **here}), self._shown)
        self._check_model()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.info.in_short}, {self._shown}>"

    @cached_property
    def sink_limits(self) -> tuple[float, ...]:
        """See `persona_lens.backend.sinks.sink_limits`; measured by one small request."""
        return limits_from(self.forward(probe(self._config), (), NORMS).reads["norms"])

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, edits: Edits = (), reads: Sequence[Read] = ()
    ) -> Generation:
        """See `persona_lens.backend.protocol.Backend.generate`."""
        tokens, edits = TokenBatch.of(prompts), as_edits(edits)
        check_request(self.info, self._vocabulary, tokens, edits, reads)
        sampling.check_rows(len(tokens))
        check_fits(self.context_length, tokens.lengths, sampling.max_new_tokens)
        parts = self._parts(edits, reads, sampling.thinking_budget)
        if not sampling.use_cache:
            raise BackendError("a server always keeps keys and values; leave use_cache as it is")
        most, limits = sampling.max_new_tokens, self._limits(edits, reads)
        noises = noises_of(sampling, len(tokens))

        def row(number: int) -> Generation:
            mine = tuple(edits_of_rows(edits, number, number + 1, tokens.lengths))
            order = RowOrder(
                mine,
                tuple(reads),
                noises[number],
                sink_limits=limits,
                parts=parts,
                thinking_budget=sampling.thinking_budget,
            )
            given, found = self._complete(tokens.prompts[number], order, most + order.needs_last_token)
            response, ended = cut_response(given, self.end_ids, most)
            return Generation((response,), (ended,), self._reads(found, reads))

        return Generation.joined(self._rows(row, len(tokens)))

    def forward(
        self, tokens: TokenBatch, edits: Edits = (), reads: Sequence[Read] = (), *, logprobs: bool = False
    ) -> ForwardResult:
        """See `persona_lens.backend.protocol.Backend.forward`."""
        edits = as_edits(edits)
        check_request(self.info, self._vocabulary, tokens, edits, reads)
        if not reads and not logprobs:
            return ForwardResult()
        check_fits(self.context_length, tokens.lengths)
        parts = self._parts(edits, reads)
        limits = self._limits(edits, reads)

        def row(number: int) -> ForwardResult:
            prompt, response = tokens.prompts[number], tokens.responses[number]
            mine = tuple(edits_of_rows(edits, number, number + 1, tokens.lengths))
            order = RowOrder(mine, tuple(reads), None, len(prompt), logprobs, limits, parts)
            _, found = self._complete((*prompt, *response), order, 1)
            scored = (_taken(lambda: tensor_from(found["logprobs"]), self._shown),) if logprobs else None
            return ForwardResult(self._reads(found, reads), scored)

        return ForwardResult.joined(self._rows(row, len(tokens)))

    def editing(self, edits: Edits) -> AbstractContextManager[None]:
        """Not possible: the model is on a server.

        Raises:
            BackendError: Always.
        """
        raise BackendError("a model on a server cannot be trained; open it through the transformers backend")

    def _rows(self, row: Callable[[int], Piece], count: int) -> list[Piece]:
        return [done for _, done in in_threads(row, range(count), self._at_once, in_order=True)]

    def _parts(self, edits: Sequence[Edit], reads: Sequence[Read], budget: int | None = None) -> Markup | None:
        """What tells thinking from answer, where that is asked; raises for thinking that the model never does."""
        parts_for(self.tokenizer, edits, reads)
        limited = limited_for(self.tokenizer, budget)
        if limited is None and not ask_parts(edits, reads):
            return None
        found = Parts.of(self.tokenizer)  # the server's own template may be another one
        return found.marks, found.separators, found.newlines

    def _limits(self, edits: Sequence[Edit], reads: Sequence[Read]) -> tuple[float, ...] | None:
        return self.sink_limits if depend_on_sinks(edits, reads) else None

    def _check_model(self) -> None:
        text, info = text_config(self._config), self.info
        if (text.num_hidden_layers, text.hidden_size) != (info.n_layers, info.d_model):
            raise RemoteError(
                f"{self._shown} runs {info.n_layers} layers of {info.d_model}, and {info.model} has "
                f"{text.num_hidden_layers} of {text.hidden_size}: name the model that it runs"
            )

    def _facts(self, found: Any) -> dict[str, Any]:
        """What the server says of itself.

        Raises:
            RemoteError: If it takes no orders.
        """
        facts = found.get(TAG) if isinstance(found, dict) else None
        if not isinstance(facts, dict):
            raise RemoteError(
                f"{self._shown} takes no edits or reads; start it as vllm serve MODEL {MADE_WITH}, where persona-lens "
                "is installed"
            )
        if facts.get("version") != VERSION:
            raise RemoteError(
                f"{self._shown} takes orders of version {facts.get('version')}, and {VERSION} is spoken here"
            )
        if facts.get("refusal"):
            raise RemoteError(f"{self._shown} takes no orders: {in_short(str(facts['refusal']), 500)}")
        return facts

    def _complete(self, ids: Sequence[int], order: RowOrder, most: int) -> tuple[list[int], dict[str, Any]]:
        """The tokens that a request brought, and what was found on the way."""
        asked = {"model": self._served_as, "prompt": list(ids), "max_tokens": most, "stop_token_ids": self.end_ids}
        answer = self._ask("POST", "/completions", {**_NEUTRAL, **asked, "vllm_xargs": {ORDER: order.text()}})
        found = answer.get(TAG)
        if not isinstance(found, dict):
            raise RemoteError(f"{self._shown} did not do what was ordered; it no longer takes orders")
        return _taken(lambda: [int(token) for token in answer["choices"][0]["token_ids"]], self._shown), found

    def _reads(self, found: dict[str, Any], reads: Sequence[Read]) -> dict[str, Tensor]:
        names = [read.kind.value for read in reads]
        return _taken(lambda: {name: tensor_from(found["reads"][name]) for name in names}, self._shown)

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        try:
            answer = self._client.request(method, path, json=body)
        except httpx.TimeoutException as error:
            raise RemoteError(f"no answer from {self._shown}: {error}; raise timeout, or send fewer at once") from error
        except httpx.HTTPError as error:
            raise RemoteError(f"{self._shown} cannot be reached: {in_short(str(error), 200)}") from error
        try:
            found = json.loads(answer.content)
        except ValueError:
            found = None
        if answer.status_code == 200 and isinstance(found, dict):
            return found
        if answer.status_code in (401, 403):
            raise RemoteError(f"{self._shown} does not accept the key in {self._key_variable}")
        told = found.get("error") if isinstance(found, dict) else answer.text
        said = told.get("message") if isinstance(told, dict) else told
        raise RemoteError(f"{self._shown} answers with status {answer.status_code}: {in_short(str(said), 1000)}")


def _taken(take: Callable[[], Taken], shown: str) -> Taken:
    """A part of an answer.

    Raises:
        RemoteError: If it is not there.
    """
    try:
        return take()
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RemoteError(f"{shown} answers otherwise than expected: {in_short(str(error), 200)}") from error
