"""SAE decomposition: which features of a sparse autoencoder a vector is made of (method, section 8).

Sparse autoencoders are SAELens's; what stands here needs their decoder directions and their encoder, nothing more.
"""

from persona_lens.features.corpus import read_corpus
from persona_lens.features.decoder import Decoder, FileDecoder, TensorDecoder
from persona_lens.features.dictionary import Features, FeaturesError, layer_of_hook
from persona_lens.features.dissection import Dissection, DissectSettings, dissect, dissection_work
from persona_lens.features.examples import Activity, Example, FeatureExamples, find_examples
from persona_lens.features.pursuit import Pursuit, pursue
from persona_lens.features.ranking import RankedFeature, Ranking, decoder_cosines, rank
from persona_lens.features.saelens import load_features
from persona_lens.features.singles import FeatureEffect, feature_effects, feature_steering

__all__ = [
    "Activity",
    "Decoder",
    "DissectSettings",
    "Dissection",
    "Example",
    "FeatureEffect",
    "FeatureExamples",
    "Features",
    "FeaturesError",
    "FileDecoder",
    "Pursuit",
    "RankedFeature",
    "Ranking",
    "TensorDecoder",
    "decoder_cosines",
    "dissect",
    "dissection_work",
    "feature_effects",
    "feature_steering",
    "find_examples",
    "layer_of_hook",
    "load_features",
    "pursue",
    "rank",
    "read_corpus",
]
