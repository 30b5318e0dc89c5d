"""Text of others, shown so that nothing in it hides or acts, and no secret in an address shows; counts in words.

Whatever a person, a model or a file said goes through here before anybody sees it. The command line's one console and
its `say` do so for the terminal; the reports' and heat maps' templates and figures do so for HTML and SVG.
"""

from __future__ import annotations

import base64
import json
import re
import reprlib
import unicodedata
from collections.abc import Iterable, Sequence
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

# Whatever acts on a terminal, is forbidden in XML, turns text around, or cannot be seen: control characters, halves of
# surrogate pairs, bidirectional and other format characters, fillers, selectors, tags, and what is no character. Line
# feed, tab, and the joiners and selectors that scripts and emoji need are left out.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ud800-\udfff\ufdd0-\ufdef\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
    + "".join(f"{chr(plane + 0xFFFE)}{chr(plane + 0xFFFF)}" for plane in range(0x10000, 0x110000, 0x10000))
    + "]"
)
_TO_THE_RIGHT = ("R", "AL", "AN", "RLE", "RLO", "RLI")
ISOLATE, END_ISOLATE = "\u2068", "\u2069"


def printable(text: str) -> str:
    """Text that shows what it holds: control characters as pictures, invisible and bidirectional ones by code."""
    return _UNSAFE.sub(_shown, text.replace("\r\n", "\n"))


def in_short(text: str, limit: int = 60) -> str:
    """Text on one line, of so many characters at most, that shows what it holds."""
    line = " ".join(text[: 40 * limit].split())
    cut = len(line) > limit or len(text) > 40 * limit
    return printable(line[: limit - 1].rstrip() + "…" if cut else line)


def isolated(text: str) -> str:
    """Text that leaves the order of what stands beside it alone, though it be written from right to left."""
    if text.isascii() or not any(unicodedata.bidirectional(sign) in _TO_THE_RIGHT for sign in text):
        return text
    return f"{ISOLATE}{text}{END_ISOLATE}"


def escaped(json_text: str) -> str:
    """JSON whose texts are escaped wherever a terminal would do something else than show them; the same values."""
    return _UNSAFE.sub(_json_escape, json_text)


def code_of(character: str) -> str:
    """A character by its code: ``[U+200B]``."""
    return f"[U+{ord(character):04X}]"


def _shown(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\N{REPLACEMENT CHARACTER}" if 0xD800 <= code <= 0xDFFF else code_of(match[0])


def _json_escape(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


class _Short(reprlib.Repr):
    """Looks at no more of a value than it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 60
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 6
        self.maxlevel = 3


def shown(value: object, limit: int = 80) -> str:
    """A value that somebody gave, for a message: short, whatever it holds, and harmless on a terminal."""
    try:
        return in_short(_Short().repr(value), limit)
    except (ValueError, RecursionError):  # thousands of digits
        return type(value).__name__


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


def without_secrets(text: object) -> str:
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


def counted(n: int, noun: str) -> str:
    """``1 question``, ``1,250 questions``, ``3 replies``."""
    plural = re.sub("([^aeiou])y$", r"\1ie", noun) + "s"
    return f"{n:,} {noun if n == 1 else plural}"


def listed(words: Sequence[str], joint: str = "and") -> str:
    """Words with commas, and the last with ``and``, or what stands for it."""
    *first, last = words
    return f"{', '.join(first)} {joint} {last}" if first else last


def capital(words: str) -> str:
    """Words that begin a sentence."""
    return words[:1].upper() + words[1:]
