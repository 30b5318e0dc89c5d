"""The ``transformers`` backend: plain PyTorch hooks on a Hugging Face model. The reference for the others."""

from __future__ import annotations

from typing import Any

from persona_lens.backend import Backend, BackendSpec


def _open(
    model: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> Backend:
    from persona_lens_transformers.adapter import TransformersBackend

    return TransformersBackend.open(
        model,
        revision=revision,
        dtype=dtype,
        device=device,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )


def _accepts(model: object) -> bool:
    return any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__)


def _wrap(model: Any, tokenizer: Any) -> Backend:
    from persona_lens_transformers.adapter import TransformersBackend

    return TransformersBackend.wrap(model, tokenizer)


SPEC = BackendSpec(
    name="transformers",
    summary="plain PyTorch hooks on a Hugging Face model (the default)",
    requires=("transformers",),
    install="pip install persona-lens",
    open=_open,
    accepts=_accepts,
    wrap=_wrap,
)
