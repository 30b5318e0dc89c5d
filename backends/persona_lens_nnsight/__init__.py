"""The ``nnsight`` backend: interventions as nnsight traces, here or on an NDIF server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from persona_lens.backend import Backend, BackendError, BackendSpec
from persona_lens.core.plugins import install_command

if TYPE_CHECKING:
    from persona_lens.backend.protocol import ServerStatus


# What only models on this machine take, and what only those on a server; neither takes it beside these values.
HERE = ("dtype", "device", "device_map")
THERE = ("request_timeout", "requests_at_once", "store_hosts", "on_status", "offline")
UNSET: tuple[object, ...] = ("auto", None, False, (), [])


def _open(model: str, *, remote: bool = False, **options: Any) -> Backend:
    others, why = (
        (HERE, "is the server's to choose for a remote model; leave it out")
        if remote
        else (THERE, "only means something for a remote model; add remote=True (--remote)")
    )
    for name in others:
        if options.pop(name, None) not in UNSET:
            raise BackendError(f"{name} {why}")
    given = {name: value for name, value in options.items() if value is not None}
    if remote:
        from persona_lens_nnsight.remote_adapter import RemoteNNsightBackend

        return RemoteNNsightBackend.open_remote(model, **given)
    from persona_lens_nnsight.adapter import NNsightBackend

    return NNsightBackend.open(model, **given)


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
    install=install_command("nnsight"),
    open=_open,
    accepts=_accepts,
    wrap=_wrap,
    server=_server,
    options=("revision", *HERE, "trust_remote_code", "chat_template", "remote", *THERE),
)
