"""The ``nnsight`` backend: interventions as nnsight traces, here or on an NDIF server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from persona_lens.backend import Backend, BackendError, BackendSpec

if TYPE_CHECKING:
    from persona_lens.backend.protocol import ServerStatus


def _open(
    model: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
    remote: bool = False,
    request_timeout: float | None = None,
    requests_at_once: int | None = None,
    store_hosts: Sequence[str] = (),
    on_status: Callable[[str], None] | None = None,
    offline: bool = False,
) -> Backend:
    here: dict[str, Any] = {"dtype": dtype, "device": device, "device_map": device_map}
    there: dict[str, Any] = {
        "request_timeout": request_timeout,
        "requests_at_once": requests_at_once,
        "store_hosts": store_hosts,
        "on_status": on_status,
        "offline": offline,
    }
    if not remote:
        from persona_lens_nnsight.adapter import NNsightBackend

        _refuse(there, "only means something for a remote model; add remote=True (--remote)")
        return NNsightBackend.open(model, revision=revision, trust_remote_code=trust_remote_code, **here)
    from persona_lens_nnsight.remote_adapter import RemoteNNsightBackend

    _refuse(here, "is the server's to choose for a remote model; leave it out")
    return RemoteNNsightBackend.open_remote(
        model,
        revision=revision,
        trust_remote_code=trust_remote_code,
        **{name: value for name, value in there.items() if value is not None},
    )


def _refuse(options: dict[str, Any], why: str) -> None:
    for name, value in options.items():
        if value not in ("auto", None, False, (), []):
            raise BackendError(f"{name} {why}")


def _accepts(model: object) -> bool:
    return any(base.__module__.startswith("nnsight.") for base in type(model).__mro__)


def _wrap(model: Any, tokenizer: Any) -> Backend:
    from persona_lens_nnsight.adapter import NNsightBackend

    return NNsightBackend.wrap(model, tokenizer)


def _server() -> ServerStatus:
    from persona_lens_nnsight.server import Server

    return Server.configured().status()


SPEC = BackendSpec(
    name="nnsight",
    summary="nnsight traces, here or on an NDIF server",
    requires=("nnsight",),
    install="pip install 'persona-lens[nnsight]'",
    open=_open,
    accepts=_accepts,
    wrap=_wrap,
    server=_server,
)
