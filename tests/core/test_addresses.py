"""Addresses as they are shown: what is secret in them stands nowhere."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import hide, secrets_in, without_credentials
from persona_lens.core.text import without_secrets as shown

PLAIN = (
    "https://example.org",
    "http://127.0.0.1:8000/v1",
    "http://[::1]:8000/v1",
    "https://example.org/v1?api-version=2024-10-21",
    "https://example.org/@user/page",
    "no address at all",
)
SECRET = {
    "http://me:s3cret@h/v1": "http://h/v1",
    "http://s3cret@h:80": "http://h:80",
    "http://me:s3cr/et@h/v1": "http://h/v1",
    "http://me:s3cr?et@h/v1": "http://h/v1",
    "https://h/v1?api_key=s3cret&a=1": "https://h/v1?api_key=…&a=1",
    "https://h/v1?x=s3cretThatIsLongEnoughForAKey": "https://h/v1?x=…",
    "https://h/v1#access_token=s3cret": "https://h/v1",
    "http://me:s3cret@[broken": "http://…",
}


@pytest.mark.parametrize("address", PLAIN)
def test_what_is_not_secret_stays(address: str) -> None:
    assert without_credentials(address) == address


@pytest.mark.parametrize("address", SECRET)
def test_what_is_secret_goes(address: str) -> None:
    assert without_credentials(address) == SECRET[address]
    assert str(PersonaLensError(f"cannot reach {address}, sorry")) == f"cannot reach {SECRET[address]}, sorry"


def test_what_a_peer_repeats_is_hidden_in_every_form() -> None:
    secrets = secrets_in("http://me:s3%40cret@h/v1?key=abc")
    basic = base64.b64encode(b"me:s3@cret").decode()
    assert hide(f"s3%40cret s3@cret {basic} abc me", secrets) == "… … … … me"
    assert secrets_in("http://h/v1") == ()


@given(st.text(), st.text(alphabet="abc:/@?#[]%&=", min_size=1))
def test_no_text_is_too_odd(text: str, address: str) -> None:
    shown(f"{text} http://{address} {text}")
    secrets_in(f"http://{address}")
