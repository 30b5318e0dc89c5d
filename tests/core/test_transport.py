"""Answers that would not end, or grow without end, for those that have no event loop."""

from __future__ import annotations

import time

import httpx
import pytest

from persona_lens.core.transport import AnswerError, BoundedClient, Bounds
from tests.models.server.liars import LIES, lying

BODY = {"messages": [{"role": "user", "content": "the number 57"}], "logprobs": True}


@pytest.mark.parametrize("name", ["a byte at a time", "headers a byte at a time", "provisional answers without end"])
@pytest.mark.parametrize("stream", [False, True])
def test_every_answer_has_a_deadline(name: str, stream: bool) -> None:
    began = time.monotonic()
    with lying(LIES[name]) as url, BoundedClient(Bounds(0.3)) as client:
        request = client.build_request("POST", url, json=BODY)
        if stream and name == "a byte at a time":  # its beginning comes in time, and the rest is the reader's
            client.send(request, stream=True).close()
        else:
            with pytest.raises(httpx.TimeoutException):
                client.send(request, stream=stream)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("name", ["a body without end", "a bomb of gzip", "an announcement of an exabyte"])
def test_every_answer_has_a_largest_size(name: str) -> None:
    expected = pytest.raises(AnswerError, match=r"longer than 1\.0 MB")
    with lying(LIES[name]) as url, BoundedClient(Bounds(10.0, 2**20)) as client, expected:
        client.post(url, json=BODY)


def test_an_honest_answer_is_whole() -> None:
    with lying(LIES["gzip that nobody asked for"]) as url, BoundedClient(Bounds(10.0)) as client:
        answer = client.post(url, json=BODY)
    assert answer.json()["choices"][0]["message"]["content"] == "57"
    assert "content-encoding" not in answer.headers
