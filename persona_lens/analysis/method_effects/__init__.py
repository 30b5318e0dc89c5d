"""Method effects: directions made by several methods, compared by what they detect, do, and move besides."""

from __future__ import annotations

from persona_lens.analysis.method_effects.plan import MethodSettings
from persona_lens.analysis.method_effects.run import MethodEffects, compare_methods, compare_methods_work

__all__ = ["MethodEffects", "MethodSettings", "compare_methods", "compare_methods_work"]
