"""Method effects: directions of one trait made by several methods, compared by what steering along them does."""

from __future__ import annotations

from persona_lens.analysis.method_effects.plan import MethodSettings
from persona_lens.analysis.method_effects.run import MethodEffects, compare_methods, compare_methods_work

__all__ = ["MethodEffects", "MethodSettings", "compare_methods", "compare_methods_work"]
