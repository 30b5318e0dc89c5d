"""Finding backends: each is an installed package's entry point in the group ``persona_lens.backends``."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from persona_lens.backend.protocol import Backend, BackendError, BackendSpec
from persona_lens.core.plugins import Registry

GROUP = "persona_lens.backends"
DEFAULT = "transformers"
BACKENDS: Registry[BackendSpec] = Registry(GROUP, BackendSpec, "backend", BackendError)


@dataclass(frozen=True)
class BackendStatus:
    """One registered backend and whether it can be used.

    Attributes:
        name: Name of the entry point.
        summary: What it is, or why it could not be loaded.
        versions: Installed version of each distribution it needs; None for one that is missing.
        install: The command that installs what is missing.
        broken: Why the adapter itself could not be loaded; None when it could.
    """

    name: str
    summary: str
    versions: dict[str, str | None]
    install: str
    broken: str | None = None

    @property
    def available(self) -> bool:
        """Whether everything it needs is installed."""
        return self.broken is None and None not in self.versions.values()


def backend_statuses() -> list[BackendStatus]:
    """Every registered backend, installed or not; loads no library."""
    return [
        BackendStatus(name, "failed to load", {}, "", broken=each.broken)
        if (spec := each.found) is None
        else BackendStatus(spec.name, spec.summary, {d: installed_version(d) for d in spec.requires}, spec.install)
        for name, each in BACKENDS.everything().items()
    ]


def installed_version(distribution: str) -> str | None:
    """The version of a distribution that is installed; None where it is not."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def find_backend(name: str) -> BackendSpec:
    """The backend of that name, with everything it needs installed.

    Raises:
        BackendError: If there is none of that name, it fails to load, or a distribution is missing.
    """
    spec = BACKENDS.find(name)
    missing = [d for d in spec.requires if installed_version(d) is None]
    if missing:
        raise BackendError(f"backend {name} needs {', '.join(missing)}: {spec.install}")
    return spec


def open_backend(name: str = DEFAULT, model: str = "smollm2-135m", **options: Any) -> Backend:
    """Open a model through a backend.

    Args:
        name: A registered backend, see ``persona-lens backends list``.
        model: Hub id, local folder, or the embedded ``smollm2-135m``.
        **options: The backend's own options, such as ``dtype``, ``device`` and ``chat_template``, the text of a
            template instead of the model's own; unknown ones are refused.

    Raises:
        BackendError: If the backend is unknown or not installed, or an option is not one of its own.
        ModelError: If the model cannot be found or loaded.
    """
    spec = find_backend(name)
    accepted = spec.option_names()
    for option in options:
        if option not in accepted:
            close = difflib.get_close_matches(option, accepted, n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise BackendError(f"backend {name} has no option {option!r}{hint} It takes: {', '.join(accepted)}")
    return _sound(spec.open(model, **options))


def _sound(backend: Backend) -> Backend:
    from persona_lens.backend.single_rows import sound  # which imports torch

    return sound(backend)


def wrap_model(model: object, tokenizer: Any = None, backend: str | None = None) -> Backend:
    """Make a backend of a model that is already loaded, and leave the model as it was.

    Args:
        model: A Hugging Face causal language model, a TransformerBridge, an nnsight model, or what else an installed
            backend accepts. Of what PEFT, ``torch.compile`` or data parallelism wrap, the model inside is used, with
            PEFT's layers in it.
        tokenizer: Needed where the object does not hold one.
        backend: Name of the backend to use; None takes the one that accepts the object.

    Raises:
        BackendError: If no installed backend accepts the object, or a tokenizer is missing.
    """
    specs = [find_backend(backend)] if backend is not None else list(BACKENDS.usable().values())
    accepting = [spec for spec in specs if spec.accepts(model)]
    if not accepting:
        model = _inner(model)
        accepting = [spec for spec in specs if spec.accepts(model)]
    if not accepting:
        who = f"backend {backend}" if backend is not None else "no installed backend"
        raise BackendError(
            f"{who} can{'not' if backend is not None else ''} wrap a {type(model).__module__}.{type(model).__name__}; "
            f"{_advice(model)}"
        )
    # The default comes first where several accept the object, so that the choice does not depend on what is installed.
    spec = next((s for s in accepting if s.name == DEFAULT), accepting[0])
    return _sound(find_backend(spec.name).wrap(model, tokenizer))


def _inner(model: Any) -> Any:
    """The model inside of what wraps it for training or speed."""
    from persona_lens.backend.blocks import bare_model

    adapters = getattr(model, "peft_config", None)
    if isinstance(adapters, dict) and any(getattr(a, "is_prompt_learning", False) for a in adapters.values()):
        raise BackendError(
            "this PEFT adapter puts tokens or prefixes of its own before a text, which only its own wrapper does; "
            "give the base model, or one with an adapter that changes layers, such as LoRA"
        )
    return bare_model(model)


def _advice(model: object) -> str:
    if any(base.__name__ == "HookedTransformer" for base in type(model).__mro__):
        return (
            "its weights are changed, and with them the residual stream: boot the model as a TransformerBridge "
            "(TransformerBridge.boot_transformers), or give the Hugging Face model"
        )
    return "give a Hugging Face causal language model, a TransformerBridge or an nnsight model"
