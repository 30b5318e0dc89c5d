"""What inspect_ai finds by the entry point ``inspect_ai``: the model provider ``persona-lens``.

``inspect eval task.py --model persona-lens/MODEL -M backend=nnsight``. The provider itself is imported when a model of
it is opened, so that other runs of inspect_ai pay nothing for it. So it stands beside the package `capability`, which
imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from inspect_ai.model import modelapi

if TYPE_CHECKING:
    from inspect_ai.model import ModelAPI


@modelapi(name="persona-lens")  # type: ignore[untyped-decorator]  # inspect_ai may not be there for the type checker
def persona_lens() -> type[ModelAPI]:
    """The provider's class."""
    from persona_lens.analysis.capability.inspect_model import PersonaLensAPI

    return PersonaLensAPI
