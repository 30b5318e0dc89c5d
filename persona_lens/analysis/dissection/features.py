"""`Features`: a dictionary whose directions are read some rows at a time, since all of them may not fit in memory.

What SAELens can load is read through it; it is imported only here, and late.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from persona_lens.analysis import AnalysisError
from persona_lens.backend.registry import installed_version
from persona_lens.core.errors import in_words
from persona_lens.core.plugins import install_command
from persona_lens.vectors import PersonaVectors

# Where in a model an autoencoder may sit, and which layer that is here: the stream after block l.
_AFTER_BLOCK = re.compile(r"(?:blocks\.(\d+)\.hook_(?:resid_post|out)|(?:.*\.)?(?:layers|h)\.(\d+)(?:\.output)?)")
_BEFORE_BLOCK = re.compile(r"blocks\.(\d+)\.hook_(?:resid_pre|in)")
_DASHBOARD = re.compile(r"[\w.-]+/[\w.-]+")
SAMPLED_ROWS = 16
CHUNK_VALUES = 2**24  # numbers of a decoder that are read at once: 64 MB in float32, whatever the width

Encode = Callable[[Tensor], Tensor]
"""Residuals [n, d_model] to activations [n, features], not negative where the feature is active."""


@dataclass(frozen=True, eq=False)
class TensorDecoder:
    """Directions that are in memory.

    Attributes:
        weights: [features, d_model].
    """

    weights: Float[Tensor, "features d_model"]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of features, and width of the residual stream."""
        return int(self.weights.shape[0]), int(self.weights.shape[1])

    def rows(self, start: int, stop: int) -> Float[Tensor, "n d_model"]:
        """The directions of the features from ``start`` to ``stop - 1``, not normalised: float32."""
        return self.weights[start:stop].detach().to("cpu", torch.float32)


@dataclass(frozen=True, eq=False)
class FileDecoder:
    """Directions in a safetensors file, of which only the rows asked for are ever read.

    Attributes:
        file: The file.
        name: The tensor's name, [features, d_model].

    Raises:
        AnalysisError: If the file cannot be read, or holds no such matrix.
    """

    file: Path
    name: str = "W_dec"
    shape: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        try:
            opened: Any = safe_open(self.file, framework="pt")
            names = list(opened.keys())
            if self.name not in names:
                there = ", ".join(sorted(names)) or "nothing"
                raise AnalysisError(f"{self.file} holds no decoder {self.name!r}; it holds {there}")
            shape = tuple(opened.get_slice(self.name).get_shape())
        except (SafetensorError, OSError) as error:
            raise AnalysisError(f"{self.file} is not a safetensors file, or is damaged: {error}") from error
        if len(shape) != 2 or not all(shape):
            raise AnalysisError(f"{self.name!r} in {self.file} must be [features, d_model], got {list(shape)}")
        object.__setattr__(self, "shape", shape)

    def rows(self, start: int, stop: int) -> Float[Tensor, "n d_model"]:
        """See `TensorDecoder.rows`."""
        # Opened anew each time: a file that stays open keeps every page that was read from it in memory.
        opened: Any = safe_open(self.file, framework="pt")
        found: Tensor = opened.get_slice(self.name)[start:stop]
        return found.float()


Decoder = TensorDecoder | FileDecoder
"""Directions by the number of their feature."""


def spans(decoder: Decoder) -> Iterator[tuple[int, int]]:
    """From which to which feature a decoder is read at once, so that memory does not grow with their number."""
    count, width = decoder.shape
    step = max(1, CHUNK_VALUES // width)
    return ((start, min(start + step, count)) for start in range(0, count, step))


@dataclass(frozen=True, eq=False)
class Features:
    """A dictionary of features.

    Attributes:
        name: Where it comes from: release and id, or a folder.
        hook: Where in the model it sits, as its makers wrote it.
        layer: The same as a layer here: it reads the residual stream after this block, 0-based.
        decoder: The direction of every feature.
        model: Name of the model it was trained on; None where that is not said.
        encode: Activations of all features; None where only the directions are there.
        dashboard: Model and set on Neuronpedia, such as ``gemma-2-2b/20-gemmascope-res-16k``; None without one.
    """

    name: str
    hook: str
    layer: int
    decoder: Decoder
    model: str | None = None
    encode: Encode | None = None
    dashboard: str | None = None

    @property
    def count(self) -> int:
        """Number of features."""
        return self.decoder.shape[0]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.decoder.shape[1]

    def unit(self, feature: int) -> Float[Tensor, " d_model"]:
        """The direction of a feature, of length one.

        Raises:
            AnalysisError: If there is no such feature, or its direction is zero.
        """
        if not 0 <= feature < self.count:
            raise AnalysisError(f"feature {feature} does not exist: {self.name} has features 0 to {self.count - 1}")
        row = self.decoder.rows(feature, feature + 1)[0]
        if not float(row.norm()) > 0:
            raise AnalysisError(f"the direction of feature {feature} of {self.name} is zero")
        unit: Tensor = row / row.norm()
        return unit

    def rows(self, features: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        """The directions of some features, not normalised, in the order given."""
        found = torch.empty(len(features), self.d_model)
        for start, stop in spans(self.decoder):
            inside = (features >= start) & (features < stop)
            if bool(inside.any()):
                found[inside] = self.decoder.rows(start, stop)[features[inside] - start]
        return found

    def link(self, feature: int) -> str | None:
        """The feature's public dashboard; None without one."""
        if self.dashboard is None or not _DASHBOARD.fullmatch(self.dashboard):
            return None
        return f"https://www.neuronpedia.org/{self.dashboard}/{feature}"

    def check(self, vectors: PersonaVectors, *, allow_other_model: bool = False) -> None:
        """Raise unless the dictionary belongs to the stream that the vectors of its layer belong to.

        Args:
            vectors: What is to be taken apart.
            allow_other_model: Accept a dictionary of a model with another name, such as the base model's.

        Raises:
            AnalysisError: If width, layer or model do not fit.
        """
        model = vectors.model
        if self.d_model != model.d_model:
            raise AnalysisError(
                f"{self.name} has directions of width {self.d_model}, but the residual stream of {model.model} has "
                f"{model.d_model}: they are of different models"
            )
        if self.layer >= model.n_layers:
            raise AnalysisError(
                f"{self.name} sits at {self.hook}, which is layer {self.layer}; {model.model} has layers 0 to "
                f"{model.n_layers - 1}"
            )
        if self.model is not None and not allow_other_model and _plain(self.model) != _plain(model.model):
            raise AnalysisError(
                f"{self.name} was trained on {self.model}, the vectors are of {model.model}; if that is the same "
                "model, or one close to it, allow it with allow_other_model (--allow-other-model)"
            )

    def describe(self) -> dict[str, Any]:
        """The dictionary as JSON values, for the record of a run; a sample of its directions tells it from others."""
        places = torch.linspace(0, self.count - 1, min(SAMPLED_ROWS, self.count)).long().tolist()
        sample = torch.cat([self.decoder.rows(place, place + 1) for place in places])
        return {
            "name": self.name,
            "hook": self.hook,
            "layer": self.layer,
            "model": self.model,
            "features": self.count,
            "d_model": self.d_model,
            "dashboard": self.dashboard,
            "directions": "sha256:" + hashlib.sha256(sample.contiguous().numpy().tobytes()).hexdigest(),
        }


def layer_of_hook(hook: str) -> int:
    """The layer here of a place in the residual stream, by the name that TransformerLens or Hugging Face has for it.

    ``blocks.19.hook_resid_post``, ``blocks.20.hook_resid_pre`` and ``model.layers.19`` all are layer 19.

    Raises:
        AnalysisError: If it is not the residual stream after a block.
    """
    if found := _AFTER_BLOCK.fullmatch(hook):
        return int(found[1] or found[2])
    if (found := _BEFORE_BLOCK.fullmatch(hook)) and int(found[1]) > 0:
        return int(found[1]) - 1
    raise AnalysisError(
        f"the autoencoder sits at {hook!r}, which is not the residual stream after a block (such as "
        "blocks.19.hook_resid_post); persona vectors have no directions there to compare with"
    )


def _plain(model: str) -> str:
    """A model's name without what libraries differ in: owner, capitals, punctuation."""
    return re.sub(r"[^a-z0-9.]", "", model.rstrip("/").rpartition("/")[2].lower())


CONFIG, WEIGHTS, DECODER = "cfg.json", "sae_weights.safetensors", "W_dec"


def load_features(where: str | Path) -> Features:
    """Load a sparse autoencoder through SAELens.

    Of a local folder the decoder is read in pieces, and the encoder only once it is used. One of SAELens's releases is
    downloaded and kept in memory whole.

    Args:
        where: A folder that SAELens saved, or ``RELEASE/ID`` such as
            ``qwen2.5-7b-instruct-andyrdt/resid_post_layer_19_trainer_1``; a release may be a repository,
            ``OWNER/REPOSITORY/ID``.

    Raises:
        AnalysisError: If SAELens is missing or cannot run here, there is no such autoencoder, its files are damaged, or
            it is none of a residual stream.
        AnalysisError: If its decoder cannot be read.
    """
    if Path(where).is_dir():
        return _from_folder(Path(where))
    release, sae_id = _named(str(where))
    with _saelens(f"load {where}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = _library().SAE.from_pretrained(release, sae_id, device="cpu")
    return _features(str(where), sae.cfg, TensorDecoder(sae.W_dec.detach()), lambda h: _encoded(sae, h))


@contextmanager
def _saelens(what: str) -> Iterator[None]:
    """Says in one sentence what SAELens could not do; its errors may be anything."""
    try:
        yield
    except AnalysisError:
        raise
    except Exception as error:
        raise AnalysisError(f"SAELens cannot {what}: {in_words(error)}") from error


def _from_folder(folder: Path) -> Features:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AnalysisError(
                f"{folder} holds no {name}; give a folder that SAELens saved (with save_model or save_inference_model)"
            )
    library = _library()
    with _saelens(f"read {folder / CONFIG}"):
        config = _config(library, folder)
    decoder = FileDecoder(folder / WEIGHTS, DECODER)
    if decoder.shape != (config.d_sae, config.d_in):
        raise AnalysisError(
            f"{folder / WEIGHTS} has a decoder {list(decoder.shape)}, but {CONFIG} says [{config.d_sae}, {config.d_in}]"
        )

    @cache
    def whole() -> Any:
        with _saelens(f"load {folder}"):
            return library.SAE.load_from_disk(folder, device="cpu")

    return _features(folder.name, config, decoder, lambda h: _encoded(whole(), h))


def _config(library: Any, folder: Path) -> Any:
    from sae_lens.loading.pretrained_sae_loaders import get_sae_lens_config_from_disk, handle_config_defaulting

    content = handle_config_defaulting(get_sae_lens_config_from_disk(folder, "cpu"))
    # SAELens's own class of that architecture, which knows its settings.
    kind = library.SAE.get_sae_config_class_for_architecture(content["architecture"])
    return kind.from_dict(content)


def _features(name: str, config: Any, decoder: Decoder, encode: Any) -> Features:
    if "transcoder" in config.architecture():
        raise AnalysisError(
            f"{name} is a {config.architecture()}, which writes elsewhere than it reads; its directions are none of "
            "the residual stream's"
        )
    hook = config.metadata.hook_name
    if not isinstance(hook, str):
        raise AnalysisError(f"{name} does not say where in the model it sits (hook_name in its metadata)")
    model, dashboard = config.metadata.model_name, config.metadata.neuronpedia_id
    return Features(
        name,
        hook,
        layer_of_hook(hook),
        decoder,
        model if isinstance(model, str) else None,
        encode,
        dashboard if isinstance(dashboard, str) else None,
    )


def _encoded(sae: Any, h: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = sae.encode(h.float())
    return found.to_dense() if found.is_sparse else found


def _named(where: str) -> tuple[str, str]:
    """Release and id; both may have slashes in them."""
    if "/" not in where or where.startswith(("/", ".", "~")):
        raise AnalysisError(f"there is no folder {where!r}; give one that SAELens saved, or RELEASE/ID")
    _library()
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory()
    release, _, sae_id = where.partition("/")
    if release in known:
        if sae_id not in known[release].saes_map:
            ids = list(known[release].saes_map)
            shown = ", ".join(difflib.get_close_matches(sae_id, ids, n=3, cutoff=0.3) or ids[:3])
            raise AnalysisError(f"the release {release} has no {sae_id!r}; it has {len(ids)}, such as {shown}")
        return release, sae_id
    owner, _, rest = where.partition("/")
    repository, _, inside = rest.partition("/")
    if not inside:
        close = difflib.get_close_matches(release, known, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else "."
        raise AnalysisError(
            f"SAELens has no release {release!r}{hint} A repository is given as OWNER/REPOSITORY/ID, a folder by its "
            "path"
        )
    return f"{owner}/{repository}", inside


@cache
def _library() -> Any:
    found, command = installed_version("transformer-lens"), install_command("sae")
    if installed_version("sae-lens") is None:
        raise AnalysisError(f"sparse autoencoders are loaded with SAELens, which is not installed: {command}")
    if found is not None and int(found.partition(".")[0]) >= 4:
        raise AnalysisError(
            f"SAELens needs a TransformerLens below 4, and {found} is installed; this installs one that both work "
            f"with: {command}"
        )
    try:
        import sae_lens
    except Exception as error:
        raise AnalysisError(f"SAELens cannot be imported ({in_words(error)}); install it anew: {command}") from error
    return sae_lens
