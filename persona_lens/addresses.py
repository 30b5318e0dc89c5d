"""Addresses, and the secrets in them: what is shown or stored of an address never holds a password or a key."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

HIDDEN = "…"
SHORTEST = 3
"""Characters of the shortest secret that is looked for in texts: a shorter one would be found in every word."""
# Without the punctuation that ends a sentence.
_ADDRESS = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>`]*[^\s'\"<>`,.;:!?)]")
_SECRET_NAME = re.compile(r"key|token|secret|pass|pwd|auth|sig|cred|code|session", re.IGNORECASE)
_LONG = 20  # characters: versions and names are shorter, keys longer


def without_credentials(address: str) -> str:
    """An address without the user name, password and key that it may hold.

    >>> without_credentials("https://me:secret@example.org/v1?key=abc&api-version=2024-10-21")
    'https://example.org/v1?key=…&api-version=2024-10-21'
    """
    scheme, marks, rest = address.partition("://")
    if not marks:
        return address
    _, _, plain = _split_user(rest)
    try:
        parts = urlsplit(f"{scheme}://{plain}")
    except ValueError:
        return f"{scheme}://{HIDDEN}"
    fields = [
        f"{name}={HIDDEN}" if equals and _is_secret(name, value) else f"{name}{equals}{value}"
        for name, equals, value in (field.partition("=") for field in parts.query.split("&"))
    ]
    return urlunsplit(parts._replace(query="&".join(fields), fragment=""))


def shown(text: object) -> str:
    """A text in which addresses may stand, each without its credentials."""
    return _ADDRESS.sub(lambda found: without_credentials(found.group()), str(text))


def secrets_in(address: str) -> tuple[str, ...]:
    """What `without_credentials` takes out of an address, in every form in which it may come back."""
    scheme, _, rest = address.partition("://")
    user, password, plain = _split_user(rest)
    found = [password or user]
    if password:
        found.append(base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode())
    try:
        query = urlsplit(f"{scheme}://{plain}").query
    except ValueError:
        query = ""
    found += [value for name, value in parse_qsl(query) if _is_secret(name, value)]
    return forms_of(found)


def forms_of(secrets: Iterable[str]) -> tuple[str, ...]:
    """Secrets as they are, and as they are written in addresses and in JSON; the longest first."""
    forms = {
        form
        for secret in secrets
        for plain in (secret, unquote(secret))
        for form in (plain, quote(plain, safe=""), json.dumps(plain)[1:-1])
        if len(form) >= SHORTEST
    }
    return tuple(sorted(forms, key=lambda form: (-len(form), form)))


def hide(text: str, secrets: Iterable[str]) -> str:
    """A text without these secrets."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text


def _split_user(rest: str) -> tuple[str, str, str]:
    """User name and password of what follows ``://``, and the rest without them."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    port = authority.rpartition("@")[2].rpartition("]")[2].partition(":")[2]
    if "@" in authority:
        user, _, plain = authority.rpartition("@")
        plain += rest[len(authority) :]
    elif port and not port.isdecimal() and "@" in rest:
        # A password with a slash in it, which ends no host.
        user, _, plain = rest.rpartition("@")
    else:
        return "", "", rest
    name, _, password = user.partition(":")
    return name, password, plain


def _is_secret(name: str, value: str) -> bool:
    return bool(value) and (len(value) > _LONG or bool(_SECRET_NAME.search(name)))
