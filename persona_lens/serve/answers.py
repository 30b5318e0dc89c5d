"""What the server says: OpenAI's objects and errors, with what was read under ``persona_lens``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from starlette.responses import JSONResponse
from torch import Tensor

from persona_lens.backend import TokenScore
from persona_lens.monitoring import AlarmKind, Alert, Gauge
from persona_lens.serve.said import Apart, decimals
from persona_lens.serve.workbench import Answer, Begun, Planned, Said, gauge_names, sounded

DONE = b"data: [DONE]\n\n"
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def failure(
    status: int, message: str, code: str | None = None, param: str | None = None, **headers: str
) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    error = {"message": message, "type": kind, "param": param, "code": code}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse({"error": error}, status, headers=named)


def event(value: Mapping[str, Any]) -> bytes:
    """One event of a stream."""
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n".encode()


def numbers(values: Float[Tensor, " some"] | Iterable[float]) -> list[float | None]:
    """Numbers as JSON has them: no NaN."""
    return list(decimals(values.tolist() if isinstance(values, Tensor) else values))


def gauges_told(gauges: Sequence[Gauge]) -> list[dict[str, Any]]:
    """Which gauges values are of, in their order."""
    return [name.to_json() for name in gauge_names(gauges)]


def begun_told(planned: Planned, begun: Begun) -> dict[str, Any]:
    """What is known before a reply begins."""
    return {
        "gauges": gauges_told(planned.panel.gauges),
        "prompt_last": numbers(begun.prompt_last),
        "forecast": [each.to_json() for each in begun.forecast],
        "edits": planned.steering,
        "history": planned.history,
        "seed": planned.asked.seed,
        "prompt_tokens": len(planned.asked.prompt),
    }


def said_told(said: Said) -> dict[str, Any]:
    """A token with its values."""
    told = {"id": said.id, "text": said.text, "values": numbers(said.values)}
    return told if said.part is None else {**told, "part": said.part}


def answer_told(planned: Planned, answer: Answer) -> dict[str, Any]:
    """What is known once a reply is over."""
    return {
        "means": numbers(answer.means),
        "alarms": [_alert_told(planned, alert) for alert in answer.alerts],
        "ended": answer.ended,
        "rest": answer.rest,
    }


def _alert_told(planned: Planned, alert: Alert) -> dict[str, Any]:
    told = sounded(planned.panel, alert).to_json()
    return {**told, "sds": None if alert.sds is None else numbers([alert.sds])[0]}


def unsaid(answer: Answer, prompt: int) -> Answer:
    """An answer of which nothing but how likely its prompt of so many tokens was is wanted."""
    scores = None if answer.scores is None else answer.scores[: prompt - 1]
    means = torch.full_like(answer.means, torch.nan)
    alerts = tuple(each for each in answer.alerts if each.alarm.kind == AlarmKind.PROMPT_LAST)
    return Answer((), "", "", None, "", "length", means, alerts, scores)


def finish_reason(answer: Answer) -> str:
    """OpenAI's word for what ended a reply; it has none for alarms."""
    return "length" if answer.ended == "length" else "stop"


def usage(prompts: Iterable[Sequence[int]], answers: Iterable[Answer]) -> dict[str, int]:
    """Tokens that were read and written."""
    asked, said = sum(map(len, prompts)), sum(len(answer.ids) for answer in answers)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


class Wording:
    """How a kind of answer is written: of chats, or of completions.

    Args:
        chat: Which of the two.
        model: The name that the request gave.
        name: The answer's id.
        tokenizer: Writes tokens out, for their log-probabilities.
    """

    def __init__(self, chat: bool, model: str, name: str, tokenizer: Any) -> None:
        self._chat = chat
        self._written = cache(lambda token: str(tokenizer.decode([token])))
        self._head = {"id": name, "created": int(time.time()), "model": model}

    def text_of(self, answer: Answer) -> str:
        """Of a chat the answer alone, whose thinking stands beside it; of a completion everything."""
        return answer.content if self._chat else answer.text

    def whole(self, choices: Sequence[Mapping[str, Any]], used: Mapping[str, int]) -> dict[str, Any]:
        """An answer that is not streamed."""
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": list(choices), "usage": dict(used)}

    def choice(
        self,
        index: int,
        text: str,
        logprobs: Mapping[str, Any] | None,
        reason: str,
        told: Mapping[str, Any],
        reasoning: str | None = None,
    ) -> dict[str, Any]:
        """One choice of it; its log-probabilities are as the next two have them."""
        thought = {} if reasoning is None else {"reasoning_content": reasoning}
        message = {"role": "assistant", "content": text, **thought}
        body: dict[str, Any] = {"message": message} if self._chat else {"text": text}
        return {"index": index, **body, "logprobs": logprobs, "finish_reason": reason, "persona_lens": dict(told)}

    def said_logprobs(self, said: Sequence[Said]) -> dict[str, Any] | None:
        """How likely the tokens of a reply were, where that is known."""
        scores = [each.score for each in said if each.score is not None]
        if not scores:
            return None
        if not self._chat:
            return self._listed(scores)
        return {"content": [self._scored(each) for each in scores], "refusal": None}

    def text_logprobs(self, scores: Sequence[TokenScore], first: int) -> dict[str, Any]:
        """How likely the tokens of a prompt and of what follows were; of its first nobody knows."""
        listed = self._listed(scores)
        return {name: [self._written(first) if name == "tokens" else None, *values] for name, values in listed.items()}

    def chunk(
        self,
        index: int,
        text: str | None,
        told: Mapping[str, Any],
        *,
        said: Sequence[Said] = (),
        part: Apart | None = None,
        content: str = "",
        first: bool = False,
        reason: str | None = None,
    ) -> dict[str, Any]:
        """One event of a stream; a chat tells the content, or the thinking, and a completion everything."""
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if text is not None and part != "mark":
            delta |= {"content": content} if part is None else {"reasoning_content": text}
        body: dict[str, Any] = {"delta": delta} if self._chat else {"text": text or ""}
        choice = {"index": index, **body, "logprobs": self.said_logprobs(said), "finish_reason": reason}
        return {**self._chunk_head, "choices": [choice], "persona_lens": dict(told)}

    def used(self, used: Mapping[str, int]) -> dict[str, Any]:
        """The event that says what was used."""
        return {**self._chunk_head, "choices": [], "usage": dict(used)}

    @property
    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk" if self._chat else "text_completion"}

    def _listed(self, scores: Sequence[TokenScore]) -> dict[str, list[Any]]:
        """As completions list them; of tokens that are written alike the likeliest is told."""
        return {
            "tokens": [self._written(each.id) for each in scores],
            "token_logprobs": numbers(each.logprob for each in scores),
            "top_logprobs": [self._likeliest(each) for each in scores],
        }

    def _likeliest(self, score: TokenScore) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for token, logprob in zip(score.top_ids, numbers(score.top_logprobs), strict=True):
            found.setdefault(self._written(token), logprob)
        return found

    def _scored(self, score: TokenScore) -> dict[str, Any]:
        pairs = zip(score.top_ids, score.top_logprobs, strict=True)
        return {**self._entry(score.id, score.logprob), "top_logprobs": [self._entry(*pair) for pair in pairs]}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._written(token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}
