"""Sparse autoencoders that SAELens can load, as `Features`. SAELens is imported only here, and late."""

from __future__ import annotations

import difflib
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from persona_lens.analysis.features import Features, FeaturesError, FileDecoder, TensorDecoder, layer_of_hook
from persona_lens.backend.registry import installed_version

COMMAND = "pip install 'persona-lens[sae]'"
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
        FeaturesError: If SAELens is missing or cannot run here, there is no such autoencoder, its files are damaged, or
            it is none of a residual stream.
        DecoderError: If its decoder cannot be read.
    """
    if Path(where).is_dir():
        return _from_folder(Path(where))
    release, sae_id = _named(str(where))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sae = _library().SAE.from_pretrained(release, sae_id, device="cpu")
    except FeaturesError:
        raise
    except Exception as error:
        raise FeaturesError(f"SAELens cannot load {where}: {_first_line(error)}") from error
    return _features(str(where), sae.cfg, TensorDecoder(sae.W_dec.detach()), lambda h: _encoded(sae, h))


def _from_folder(folder: Path) -> Features:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FeaturesError(
                f"{folder} holds no {name}; give a folder that SAELens saved (with save_model or save_inference_model)"
            )
    library = _library()
    try:
        config = _config(library, folder)
    except Exception as error:
        raise FeaturesError(f"SAELens cannot read {folder / CONFIG}: {_first_line(error)}") from error
    decoder = FileDecoder(folder / WEIGHTS, DECODER)
    if decoder.shape != (config.d_sae, config.d_in):
        raise FeaturesError(
            f"{folder / WEIGHTS} has a decoder {list(decoder.shape)}, but {CONFIG} says [{config.d_sae}, {config.d_in}]"
        )

    @cache
    def whole() -> Any:
        try:
            return library.SAE.load_from_disk(folder, device="cpu")
        except Exception as error:
            raise FeaturesError(f"SAELens cannot load {folder}: {_first_line(error)}") from error

    return _features(folder.name, config, decoder, lambda h: _encoded(whole(), h))


def _config(library: Any, folder: Path) -> Any:
    from sae_lens.loading.pretrained_sae_loaders import get_sae_lens_config_from_disk, handle_config_defaulting

    content = handle_config_defaulting(get_sae_lens_config_from_disk(folder, "cpu"))
    # SAELens's own class of that architecture, which knows its settings.
    kind = library.SAE.get_sae_config_class_for_architecture(content["architecture"])
    return kind.from_dict(content)


def _features(name: str, config: Any, decoder: FileDecoder | TensorDecoder, encode: Any) -> Features:
    if "transcoder" in config.architecture():
        raise FeaturesError(
            f"{name} is a {config.architecture()}, which writes elsewhere than it reads; its directions are none of "
            "the residual stream's"
        )
    hook = config.metadata.hook_name
    if not isinstance(hook, str):
        raise FeaturesError(f"{name} does not say where in the model it sits (hook_name in its metadata)")
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
        raise FeaturesError(f"there is no folder {where!r}; give one that SAELens saved, or RELEASE/ID")
    _library()
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory()
    release, _, sae_id = where.partition("/")
    if release in known:
        if sae_id not in known[release].saes_map:
            ids = list(known[release].saes_map)
            shown = ", ".join(difflib.get_close_matches(sae_id, ids, n=3, cutoff=0.3) or ids[:3])
            raise FeaturesError(f"the release {release} has no {sae_id!r}; it has {len(ids)}, such as {shown}")
        return release, sae_id
    owner, _, rest = where.partition("/")
    repository, _, inside = rest.partition("/")
    if not inside:
        close = difflib.get_close_matches(release, known, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else "."
        raise FeaturesError(
            f"SAELens has no release {release!r}{hint} A repository is given as OWNER/REPOSITORY/ID, a folder by its "
            "path"
        )
    return f"{owner}/{repository}", inside


@cache
def _library() -> Any:
    found = installed_version("transformer-lens")
    if installed_version("sae-lens") is None:
        raise FeaturesError(f"sparse autoencoders are loaded with SAELens, which is not installed: {COMMAND}")
    if found is not None and int(found.partition(".")[0]) >= 4:
        raise FeaturesError(
            f"SAELens needs a TransformerLens below 4, and {found} is installed; this installs one that both work "
            f"with: {COMMAND} 'transformer-lens<4'"
        )
    try:
        import sae_lens
    except Exception as error:
        raise FeaturesError(f"SAELens cannot be imported ({_first_line(error)}); install it anew: {COMMAND}") from error
    return sae_lens


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
