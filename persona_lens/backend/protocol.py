"""The contract between the engine and the backends.

A backend deals in token ids, never text, and in whole batches. The engine knows backends only by what stands here.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from persona_lens.backend.reads import joined_reads
from persona_lens.core.errors import PersonaLensError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from persona_lens.backend.edits import Edit
    from persona_lens.backend.reads import Read
    from persona_lens.backend.tokens import Sampling, TokenBatch, TokenIds, TokenScore

DIGEST_SHOWN = 39  # characters of a weights' digest that tell most models apart
MAX_NUMBERS = 2**26  # in one direction for every layer; the largest models have a thirtieth
OPEN = "."  # in a digest: a group of numbers that it says nothing of
LEAST_IN_COMMON = 24  # groups; a chance of 16**-24 that other weights agree in so many
_KINDS = {"str": (str,), "str | None": (str, type(None)), "int": (int,), "bool": (bool,)}


class BackendError(PersonaLensError):
    """A backend that is unknown, not installed, or does not take what it was given."""


class RemoteError(BackendError):
    """A server cannot be used, or a request to it failed; the message says what to do."""


class RequestTooLargeError(RemoteError):
    """What a request sends or brings back is more than the server takes; fewer rows at once may do."""


def same_weights(one: str, other: str) -> bool:
    """Whether two digests are of the same weights, in whatever precision each was loaded."""
    if one == other:
        return True
    groups = [digest.rpartition(":")[2] for digest in (one, other)]
    if len({len(each) for each in groups}) > 1 or not any(OPEN in each for each in groups):
        return False
    known = [pair for pair in zip(*groups, strict=True) if OPEN not in pair]
    return len(known) >= LEAST_IN_COMMON and all(a == b for a, b in known)


@dataclass(frozen=True)
class ModelInfo:
    """Which model a backend runs, and how.

    Attributes:
        model: Hub id, folder name or embedded name.
        revision: Commit or content id of the files it was loaded from; None for a model that was handed over loaded.
        architecture: Class name of the model.
        n_layers: Number of blocks.
        d_model: Width of the residual stream.
        weights: Digest of a sample of the weights, the same in every backend, and in every precision in the sense of
            `same_weights`; None where they cannot be read.
        dtype: Precision of the weights, such as ``bfloat16``; ``remote`` where a server keeps that to itself.
        device: Where the first block is; ``remote`` on a server.
        backend: Adapter and versions, such as ``transformers 5.22.2``.
        remote: Whether the model runs on another machine.
    """

    model: str
    revision: str | None
    architecture: str
    n_layers: int
    d_model: int
    weights: str | None
    dtype: str
    device: str
    backend: str
    remote: bool = False

    @property
    def in_short(self) -> str:
        """The model in a few words: ``smollm2-135m: 30 layers of 576, bfloat16 on cpu``."""
        name = self.model.rstrip("/").rpartition("/")[2] or self.model
        return f"{name}: {self.n_layers} layers of {self.d_model}, {self.dtype} on {self.device}"

    @staticmethod
    def from_json(found: Any) -> ModelInfo:
        """The model that a header names, which `dataclasses.asdict` wrote there.

        Raises:
            TypeError, ValueError: If it names none, or one larger than there are.
        """
        info = ModelInfo(**found)
        for each in fields(info):
            value, kinds = getattr(info, each.name), _KINDS[str(each.type)]
            if type(value) not in kinds:
                raise TypeError(f"{each.name} of the model is a {type(value).__name__}")
        if min(info.n_layers, info.d_model) < 1 or info.n_layers * info.d_model > MAX_NUMBERS:
            raise ValueError("no model has so many layers of such a width")
        return info

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every field: equal for runs that must give equal numbers."""
        return fingerprint_of(asdict(self))

    def differences(self, other: ModelInfo) -> list[str]:
        """What makes the other a different model, in words; empty when vectors of one fit the other.

        Weights decide where both are known, then the revision, then the name. Precision, device and backend do not
        make a different model.
        """
        found = [
            f"{name}: {getattr(self, name)} and {getattr(other, name)}"
            for name in ("architecture", "n_layers", "d_model")
            if getattr(self, name) != getattr(other, name)
        ]
        if self.weights and other.weights:
            if not same_weights(self.weights, other.weights):
                found.append(f"weights: {self.weights[:DIGEST_SHOWN]} and {other.weights[:DIGEST_SHOWN]}")
            return found
        name = "revision" if self.revision and other.revision else "model"
        if getattr(self, name) != getattr(other, name):
            found.append(f"{name}: {getattr(self, name)} and {getattr(other, name)}")
        return found


def fingerprint_of(told: Mapping[str, Any]) -> str:
    """The fingerprint of a model, from what `dataclasses.asdict` makes of its `ModelInfo`."""
    return "sha256:" + hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Generation:
    """What `Backend.generate` returns.

    Attributes:
        responses: Token ids of each row's response, the end-of-turn token left out.
        ended: Whether the row ended its turn within the length limit.
        reads: float32 tensors by the name of the read; see `Read` for shapes.
        scores: For each row how likely its tokens were, in their order, where a watch asks for it: those of the prompt
            but the first, if it wants them; those of the response; and the one that ended its turn.
    """

    responses: tuple[TokenIds, ...]
    ended: tuple[bool, ...]
    reads: Mapping[str, Tensor] = field(default_factory=dict)
    scores: tuple[tuple[TokenScore, ...], ...] | None = None

    @staticmethod
    def joined(pieces: Iterable[Generation]) -> Generation:
        """Several batches as one."""
        listed = list(pieces)
        responses = tuple(response for piece in listed for response in piece.responses)
        ended = tuple(flag for piece in listed for flag in piece.ended)
        scores = tuple(row for piece in listed for row in piece.scores or ())
        asked = listed[0].scores is not None
        return Generation(responses, ended, joined_reads([piece.reads for piece in listed]), scores if asked else None)


@dataclass(frozen=True)
class ForwardResult:
    """What `Backend.forward` returns.

    Attributes:
        reads: float32 tensors by the name of the read; see `Read` for shapes.
        logprobs: For each row float32 [response tokens], the log-probability (nats) of every response token given all
            before it; None when they were not asked for.
    """

    reads: Mapping[str, Tensor] = field(default_factory=dict)
    logprobs: tuple[Tensor, ...] | None = None

    @staticmethod
    def joined(pieces: Iterable[ForwardResult]) -> ForwardResult:
        """Several batches as one."""
        listed = list(pieces)
        logprobs = [row for piece in listed for row in piece.logprobs or ()]
        asked = listed[0].logprobs is not None
        return ForwardResult(joined_reads([piece.reads for piece in listed]), tuple(logprobs) if asked else None)


@runtime_checkable
class Backend(Protocol):
    """A model, opened through one library, that can be read and edited."""

    @property
    def info(self) -> ModelInfo:
        """Which model this is and where it runs."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer."""
        ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Token ids that end the model's turn."""
        ...

    @property
    def shares_prompts(self) -> bool:
        """Whether `forward` computes a prompt that several rows of a batch begin with only once.

        It need not where it edits, or reads anything of single tokens. Such a backend cuts a batch by itself into
        passes that fit its device, and gets rows ordered by prompt.
        """
        ...

    @property
    def calls_at_once(self) -> int:
        """How many calls may run at the same time, from several threads: 1 for a model in this process."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        """Generate a response to every prompt, edited throughout, and take the reads on the way.

        The backends of this package take one edit as well, and a steering; see `persona_lens.backend.edits.as_edits`.
        The reads equal those of a forward pass over the finished text, the last token included.
        """
        ...

    def forward(
        self,
        tokens: TokenBatch,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
        *,
        logprobs: bool = False,
    ) -> ForwardResult:
        """Run over existing text; stops after the deepest layer that is needed."""
        ...

    def editing(self, edits: Sequence[Edit]) -> AbstractContextManager[None]:
        """While open, the underlying Hugging Face module runs edited, gradients included (for training)."""
        ...


@dataclass(frozen=True)
class Traffic:
    """Requests to a server, planned or made.

    Attributes:
        requests: Their number.
        bytes_up: Sent.
        bytes_down: Received.
    """

    requests: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.requests + other.requests, self.bytes_up + other.bytes_up, self.bytes_down + other.bytes_down
        )


@runtime_checkable
class RemoteBackend(Backend, Protocol):
    """A backend whose model is on a server."""

    @property
    def traffic(self) -> Traffic:
        """Requests made so far, those that were tried again counted each time."""
        ...

    def generation_traffic(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
    ) -> Traffic:
        """What `generate` with these arguments would send, and receive at most; nothing is sent."""
        ...

    def forward_traffic(
        self, tokens: TokenBatch, edits: Sequence[Edit] = (), reads: Sequence[Read] = (), *, logprobs: bool = False
    ) -> Traffic:
        """What `forward` with these arguments would send and receive; nothing is sent."""
        ...


@dataclass(frozen=True)
class Deployment:
    """A model on a server.

    Attributes:
        model: Hub id.
        revision: Branch, tag or commit.
        state: The server's own word for it, such as ``RUNNING`` or ``DEPLOYING``.
        usable: Whether a request would be answered now.
    """

    model: str
    revision: str
    state: str
    usable: bool


@dataclass(frozen=True)
class ServerStatus:
    """A server that answered.

    Attributes:
        host: Its address.
        key: Whether a key is configured; never the key itself.
        account: Whom the server takes the key to belong to, if it says.
        deployments: Its models.
    """

    host: str
    key: bool
    account: str | None
    deployments: tuple[Deployment, ...]


@dataclass(frozen=True)
class BackendSpec:
    """How a backend presents itself; the object that an entry point of the group ``persona_lens.backends`` names.

    Attributes:
        name: What users call it.
        summary: One line for ``backends list``.
        requires: Distributions that must be installed, such as ``("nnsight",)``.
        install: The command that installs them.
        open: Makes a backend of a model's name. Called with the name and the options as keyword arguments.
        accepts: Whether an object that the user has already loaded can be wrapped; must not import the library.
        wrap: Makes a backend of such an object, called with the object and a tokenizer or None.
        server: Asks the server on which the backend's remote models run; None where there is no such thing.
        options: The options that ``open`` takes; by default those that its signature names.
    """

    name: str
    summary: str
    requires: tuple[str, ...]
    install: str
    open: Callable[..., Backend]
    accepts: Callable[[object], bool]
    wrap: Callable[[Any, Any], Backend]
    server: Callable[[], ServerStatus] | None = None
    options: tuple[str, ...] | None = None

    def option_names(self) -> list[str]:
        """The options that ``open`` takes by keyword."""
        return list(inspect.signature(self.open).parameters)[1:] if self.options is None else list(self.options)

    @staticmethod
    def of_class(where: str, accepts: str, options: tuple[str, ...], **described: Any) -> BackendSpec:
        """The spec of a class, which is imported only when a model is opened or wrapped.

        Args:
            where: ``module:Class``; of its class methods, ``open`` takes a model's name and the options, ``wrap`` an
                object and a tokenizer or None.
            accepts: Name of the class of the objects that can be wrapped, or of a class that they derive from.
            options: What ``open`` takes by keyword.
            **described: ``name``, ``summary``, ``requires`` and ``install``, see above.
        """
        module, _, name = where.partition(":")

        def made() -> Any:
            return getattr(importlib.import_module(module), name)

        return BackendSpec(
            open=lambda model, **given: made().open(model, **given),
            accepts=lambda model: any(base.__name__ == accepts for base in type(model).__mro__),
            wrap=lambda model, tokenizer: made().wrap(model, tokenizer),
            options=options,
            **described,
        )
