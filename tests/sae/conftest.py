"""Autoencoders made with SAELens; without it, or with a TransformerLens too new for it, nothing runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.dissection.features import _library
from tests.tiny import D_MODEL

FEATURES, K = 48, 4


@pytest.fixture(scope="session", autouse=True)
def library() -> Any:
    try:
        return _library()
    except AnalysisError as error:
        pytest.skip(f"{error}; or run `make test-sae`")


def saved(kind: str, folder: Path, *, hook: str = "blocks.1.hook_resid_post", **metadata: Any) -> Any:
    """An autoencoder of a kind with random weights, saved by SAELens."""
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    configuration = getattr(sae_lens, f"{kind}SAEConfig")
    more = {"k": K} if kind == "TopK" else {}
    described = SAEMetadata(hook_name=hook, **{"model_name": None, **metadata})
    torch.manual_seed(0)
    sae = getattr(sae_lens, f"{kind}SAE")(configuration(d_in=D_MODEL, d_sae=FEATURES, metadata=described, **more))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    sae.save_model(folder)
    return sae
