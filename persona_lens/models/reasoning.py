"""A response without its reasoning, where only its text is known, as of a model on somebody's server.

Where there are token ids, `persona_lens.backend.parts` tells the two apart.
"""

from __future__ import annotations

import re
from functools import lru_cache

from persona_lens.core.marks import CHANNEL, MARKS, Marks

_FINAL = re.compile(r"<\|channel\|>final[^<]*<\|message\|>(.*?)(?=<\|(?:end|return|start|channel)\|>|\Z)", re.DOTALL)


def answer_text(text: str, opened: Marks | None = None) -> str:
    r"""Take the reasoning out of a response.

    Args:
        text: The response, special tokens included where the model marks its reasoning with them.
        opened: What sets the reasoning apart that the prompt ended in, so that the response begins in it, whether or
            not the model repeats the mark that opened it; None where it begins outside any.

    Returns:
        The answer. Empty if the model never came to one: an unclosed block is reasoning to its end. A text
        without marks comes back unchanged.

    >>> answer_text("<think>Greet them.</think>\n\nHello!")
    'Hello!'
    >>> answer_text("<think>Greet")
    ''
    """
    if CHANNEL in text:
        finals = _FINAL.findall(text)
        return str(finals[-1]).strip() if finals else ""
    blocks, opening, closing = _patterns(opened)
    left = text
    if opened:
        first = closing.search(text)
        if first is None:
            return ""
        left = text[first.end() :]
    left = blocks.sub("", left)
    closings = list(closing.finditer(left))
    if closings:
        left = left[closings[-1].end() :]
    unclosed = opening.search(left)
    if unclosed:
        left = left[: unclosed.start()]
    return text if left == text else left.strip()


@lru_cache
def _patterns(opened: Marks | None) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """Whole blocks of reasoning, what opens one, and what closes one."""
    pairs = (*MARKS, opened) if opened else MARKS
    blocks = "|".join(f"{re.escape(begin)}.*?{re.escape(end)}" for begin, end in pairs)
    opening, closing = ("|".join(re.escape(pair[side]) for pair in pairs) for side in (0, 1))
    return re.compile(blocks, re.DOTALL), re.compile(opening), re.compile(closing)
