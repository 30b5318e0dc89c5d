"""Numbers of things in words."""

from __future__ import annotations


def counted(n: int, noun: str) -> str:
    """``1 question``, ``1,250 questions``."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
