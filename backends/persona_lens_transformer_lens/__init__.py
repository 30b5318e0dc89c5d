"""The ``transformer_lens`` backend: hooks of a TransformerBridge with unmodified weights."""

from __future__ import annotations

from typing import Any

from persona_lens.backend import Backend, BackendSpec


def _open(
    model: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Backend:
    from persona_lens_transformer_lens.adapter import TransformerLensBackend

    return TransformerLensBackend.open(
        model, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )


def _accepts(model: object) -> bool:
    return any(base.__name__ == "TransformerBridge" for base in type(model).__mro__)


def _wrap(model: Any, tokenizer: Any) -> Backend:
    from persona_lens_transformer_lens.adapter import TransformerLensBackend

    return TransformerLensBackend.wrap(model, tokenizer)


SPEC = BackendSpec(
    name="transformer_lens",
    summary="hooks of a TransformerLens TransformerBridge, weights unmodified",
    requires=("transformer-lens",),
    install="pip install 'persona-lens[transformer-lens]'",
    open=_open,
    accepts=_accepts,
    wrap=_wrap,
)
