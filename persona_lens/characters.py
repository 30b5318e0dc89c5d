"""Text of others, shown so that nothing in it hides or acts."""

from __future__ import annotations

_HARMLESS = "\n\t\u200c\u200d\ufe0e\ufe0f"


def printable(text: str) -> str:
    """Text that shows what it holds: control characters as pictures, invisible and bidirectional ones by code."""
    return "".join(map(_printable_character, text.replace("\r\n", "\n")))


def code_of(character: str) -> str:
    """A character by its code: ``[U+200B]``."""
    return f"[U+{ord(character):04X}]"


def _printable_character(character: str) -> str:
    code = ord(character)
    if character in _HARMLESS:
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if 0xD800 <= code <= 0xDFFF:
        return "\N{REPLACEMENT CHARACTER}"
    invisible = 0x7F <= code < 0xA0 or 0x200B <= code <= 0x200F or 0x2028 <= code <= 0x202E or 0x2060 <= code <= 0x206F
    return code_of(character) if invisible or code in (0x061C, 0xFEFF, 0xFFFE, 0xFFFF) else character
