"""What a request to vLLM carries in its ``extra_args``: whose it is, and what makes its tokens a sample.

A request of an engine in this process carries a dictionary. One that came over the network carries the same as JSON,
which `persona_lens_vllm.serving` wrote: it names a call that nobody else can know, and always its only row.
"""

from __future__ import annotations

import json
from functools import lru_cache
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar, Final

if TYPE_CHECKING:
    from persona_lens.backend.parts.asked import Limited

TAG: Final = "persona_lens"
ORDER: Final = "persona_lens_order"  # what a client sends, see `persona_lens_vllm.wire`


class Here:
    """What there is in this process.

    Attributes:
        engine: Whether an engine of our own: its dictionaries are taken as they are.
        limits: Of calls that are open in this worker, by name, how far their rows may think.
    """

    engine = False
    limits: ClassVar[dict[str, Limited]] = {}


def tag_of(params: Any) -> dict[str, Any]:
    """What ``SamplingParams`` say; empty for a request that is not of ours."""
    found = ((params and params.extra_args) or {}).get(TAG) or {}
    return _read(found) if isinstance(found, str) else found


@lru_cache(maxsize=4096)
def _read(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    return found


def written(call: str, noise: dict[str, Any] | None) -> str:
    """The tag of a request that is sent on over the network."""
    return json.dumps({"call": call, **({"noise": noise} if noise else {})})


def check_tag(params: Any) -> None:
    """Refuse what would stop an engine; vLLM asks this of each request before it takes it.

    Raises:
        ValueError: If a request carries what no program of ours wrote there.
    """
    given = params.extra_args or {}
    if ORDER in given:
        raise ValueError(
            f"{ORDER} is taken with completions and chat completions by a server that was started with "
            "--middleware persona_lens_vllm.serving.Orders"
        )
    tag = given.get(TAG)
    if tag is None or (Here.engine and isinstance(tag, dict)):
        return
    try:
        _check(json.loads(tag) if isinstance(tag, str) and len(tag) < 1000 else None)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{TAG} is not for clients; send {ORDER}") from None


def _check(tag: Any) -> None:
    if not isinstance(tag, dict) or not tag.keys() <= {"call", "noise"} or not isinstance(tag.get("call", ""), str):
        raise TypeError
    if "noise" in tag:
        noise = tag["noise"]
        seed, temperature, top_p = noise["seed"], noise["temperature"], noise["top_p"]
        right = type(seed) is int and 0 <= seed < 2**63 and temperature > 0 and isfinite(temperature) and 0 < top_p <= 1
        if noise.keys() != {"seed", "temperature", "top_p"} or not right:
            raise ValueError
