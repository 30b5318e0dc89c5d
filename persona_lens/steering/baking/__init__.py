"""A steering turned into weights: a model that any engine runs, steered, without this package and at no cost."""

from __future__ import annotations

from persona_lens.steering.baking.check import Check
from persona_lens.steering.baking.plan import BakingError
from persona_lens.steering.baking.run import Baked, bake

__all__ = ["Baked", "BakingError", "Check", "bake"]
