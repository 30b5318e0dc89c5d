"""`module_of`: the Hugging Face module under a backend, for what needs its weights and not only its residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from persona_lens.backend.protocol import Backend
from persona_lens.errors import PersonaLensError

if TYPE_CHECKING:
    from torch import nn


class ModuleError(PersonaLensError):
    """A backend whose model's weights are out of reach."""


@runtime_checkable
class ModuleBackend(Protocol):
    """A backend that has its model in this process; those of remote models have no such attribute."""

    @property
    def module(self) -> nn.Module:
        """The Hugging Face causal language model, as the backend's library has left it."""
        ...


def module_of(backend: Backend) -> nn.Module:
    """The Hugging Face module that a backend runs.

    Raises:
        ModuleError: If the model runs elsewhere, or the backend does not hand it out.
    """
    if backend.info.remote:
        raise ModuleError(
            f"the weights of {backend.info.model} are on a server that does not hand them out; open the model on this "
            "machine for this"
        )
    if not isinstance(backend, ModuleBackend):
        raise ModuleError(
            f"a {type(backend).__name__} does not hand out the module that it runs; give the plain backend of the model"
        )
    return backend.module
