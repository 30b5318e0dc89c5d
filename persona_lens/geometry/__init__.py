"""Geometry: how directions of traits, of layers, of two makings and of a vector's halves stand to one another."""

from persona_lens.geometry.components import Components, principal_components
from persona_lens.geometry.cosines import CHANCE, Cosines, GeometryError, cosines, layer_cosines
from persona_lens.geometry.halves import Halves, split_halves
from persona_lens.geometry.likeness import Likeness, likeness

__all__ = [
    "CHANCE",
    "Components",
    "Cosines",
    "GeometryError",
    "Halves",
    "Likeness",
    "cosines",
    "layer_cosines",
    "likeness",
    "principal_components",
    "split_halves",
]
