"""Dissection: which features of an autoencoder a trait's vector is made of, and what each does alone."""

from __future__ import annotations

from persona_lens.analysis.dissection.features import Features, load_features
from persona_lens.analysis.dissection.run import Dissection, DissectSettings, dissect, dissection_work

__all__ = ["DissectSettings", "Dissection", "Features", "dissect", "dissection_work", "load_features"]
