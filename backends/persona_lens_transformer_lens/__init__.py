"""The ``transformer_lens`` backend: hooks of a TransformerBridge with unmodified weights."""

from __future__ import annotations

from persona_lens.backend import BackendSpec
from persona_lens.core.plugins import install_command

SPEC = BackendSpec.of_class(
    "persona_lens_transformer_lens.adapter:TransformerLensBackend",
    "TransformerBridge",
    ("revision", "dtype", "device", "trust_remote_code", "chat_template"),
    name="transformer_lens",
    summary="hooks of a TransformerLens TransformerBridge, weights unmodified",
    requires=("transformer-lens",),
    install=install_command("transformer-lens"),
)
