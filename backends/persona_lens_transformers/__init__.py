"""The ``transformers`` backend: plain PyTorch hooks on a Hugging Face model. The reference for the others."""

from __future__ import annotations

from persona_lens.backend import BackendSpec

SPEC = BackendSpec.of_class(
    "persona_lens_transformers.adapter:TransformersBackend",
    "PreTrainedModel",
    ("revision", "dtype", "device", "device_map", "trust_remote_code", "chat_template"),
    name="transformers",
    summary="plain PyTorch hooks on a Hugging Face model (the default)",
    requires=("transformers",),
    install="pip install transformers",
)
