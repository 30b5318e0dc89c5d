"""The ``nnsight`` backend: interventions as nnsight traces."""

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
    remote: bool = False,
) -> Backend:
    from persona_lens_nnsight.adapter import NNsightBackend

    return NNsightBackend.open(
        model,
        revision=revision,
        dtype=dtype,
        device=device,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        on_server=remote,
    )


def _accepts(model: object) -> bool:
    return any(base.__module__.startswith("nnsight.") for base in type(model).__mro__)


def _wrap(model: Any, tokenizer: Any) -> Backend:
    from persona_lens_nnsight.adapter import NNsightBackend

    return NNsightBackend.wrap(model, tokenizer)


SPEC = BackendSpec(
    name="nnsight",
    summary="nnsight traces, here or on an NDIF server",
    requires=("nnsight",),
    install="pip install 'persona-lens[nnsight]'",
    open=_open,
    accepts=_accepts,
    wrap=_wrap,
)
