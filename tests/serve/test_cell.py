"""A server in a notebook's cell: it runs until it is closed, and only with its token."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser

import httpx
import pytest

import persona_lens as pl
from persona_lens.steering import Steering
from persona_lens.vectors import PersonaVectors
from tests.backends.fixtures import tiny_backend
from tests.serve.running import HELLO, LAYERS, TRAITS, vectors_of

HTTP = httpx.Client(trust_env=False, timeout=60)


def opened() -> tuple[pl.Backend, list[PersonaVectors]]:
    backend = tiny_backend("transformers")
    return backend, [vectors_of(backend, trait, seed) for seed, trait in enumerate(TRAITS)]


def test_a_cell_shows_a_server_that_any_client_can_ask() -> None:
    backend, vectors = opened()
    with pl.workbench(backend, vectors, layers=list(LAYERS)) as live:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", live.base_url)
        assert live.token not in repr(live)
        body = {
            "messages": HELLO,
            "max_tokens": 4,
            "persona_lens": {"edits": f"{TRAITS[0]}@1:affine(3)", "watch": [f"{TRAITS[0]}@1"]},
        }
        assert HTTP.post(f"{live.base_url}/chat/completions", json=body).status_code == 401
        keys = {"Authorization": f"Bearer {live.token}"}
        answer = HTTP.post(f"{live.base_url}/chat/completions", json=body, headers=keys).json()
        read = answer["choices"][0]["persona_lens"]
        assert read["means"] == [pytest.approx(3, abs=1e-3)]
        assert read["edits"] == str(Steering.parse(f"{TRAITS[0]}@1:affine(3)", {v.trait: v for v in vectors}))

        found: list[tuple[str, dict[str, str | None]]] = []

        class Cell(HTMLParser):
            def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
                found.append((tag, dict(attrs)))

        Cell().feed(live._repr_html_())
        (frame,) = [attributes for tag, attributes in found if tag == "iframe"]
        (link,) = [attributes for tag, attributes in found if tag == "a"]
        assert link["href"] == live.link
        assert frame["src"] == live.link.replace("127.0.0.1", "localhost")
        welcome = HTTP.get(live.link)
        assert welcome.status_code == 303
        # What holds the cell may show the page; pages of other sites may not.
        policy = welcome.headers["content-security-policy"]
        assert "frame-ancestors" in policy
        assert "http://localhost:*" in policy
        assert "*;" not in policy.replace(":*", "")
    assert "closed" in live._repr_html_()
    assert "iframe" not in live._repr_html_()
    live.close()
    with pytest.raises(httpx.TransportError):
        HTTP.get(f"{live.base_url}/models", headers=keys)


def test_two_workbenches_do_not_share_port_or_token() -> None:
    backend, vectors = opened()
    with pl.workbench(backend, vectors[0], 1) as one, pl.workbench(backend, vectors, 1) as two:
        assert one.base_url != two.base_url
        assert one.token != two.token
        refused = HTTP.get(f"{two.base_url}/models", headers={"Authorization": f"Bearer {one.token}"})
        assert refused.status_code == 401


def test_without_what_a_server_needs_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, vectors = opened()
    monkeypatch.delitem(sys.modules, "persona_lens.serve.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(pl.PersonaLensError, match=r"the workbench needs uvicorn.*install it: pip install "):
        pl.workbench(backend, vectors, 1)


def test_a_layer_must_be_known() -> None:
    backend, vectors = opened()
    with pytest.raises(pl.PersonaLensError, match="tuned"):
        pl.workbench(backend, vectors)
