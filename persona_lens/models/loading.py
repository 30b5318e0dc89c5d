"""Opening what a source names: the commit that the hub has, what its errors mean, and the model in memory."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_lens.core.errors import ModelError, first_line
from persona_lens.models.embedded import DEFAULT_MODEL
from persona_lens.models.source import ModelSource, put_on, require_peft, resolve

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


_COMMIT = re.compile("[0-9a-f]{40}")


def pinned(source: ModelSource) -> ModelSource:
    """Tie a hub model to the commit its revision stands for now.

    Weights, configuration and tokenizer are then of one commit even if the repository changes in between, and
    the commit is the model's identity. Local models are returned as they are, and so is a pinned one. Of an adapter the
    base is pinned.

    Args:
        source: The source.

    Returns:
        The source with ``content`` set.

    Raises:
        ModelError: The hub cannot be reached or does not give the model out; the message says what to do.
    """
    if source.base is not None:
        return replace(source, base=pinned(source.base))
    if source.content is not None or source.is_local:
        return source
    if source.revision is not None and _COMMIT.fullmatch(source.revision):
        return replace(source, content=source.revision)
    import huggingface_hub
    from huggingface_hub import errors

    refusals = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError)
    file: Any = {"repo_id": source.location, "filename": "config.json", "revision": source.revision}
    try:
        url = huggingface_hub.hf_hub_url(**file)
        try:
            # One question, answered or not: a download would retry for half a minute before it says "no network".
            commit = huggingface_hub.get_hf_file_metadata(url, timeout=15).commit_hash
        except refusals:
            raise
        except Exception:  # noqa: BLE001 - out of reach in one of many ways: the cache is what is left
            cached = huggingface_hub.hf_hub_download(**file, local_files_only=True)
            commit = Path(cached).parent.name  # .../snapshots/<commit>/config.json
    except Exception as error:  # the hub's client raises errors of half a dozen libraries
        raise hub_error(error, source) from error
    if commit is None:
        raise ModelError(f"what answers at {url} is not a Hugging Face hub; check HF_ENDPOINT and the proxy")
    return replace(source, revision=commit, content=commit)


def hub_error(error: BaseException, source: ModelSource) -> ModelError:
    """Say in one sentence why the hub did not give a model, and what to do.

    Args:
        error: What its client, or transformers, raised.
        source: The model asked for.

    Returns:
        The error to raise.
    """
    from huggingface_hub import errors

    name = source.location
    meanings: dict[Any, str] = {
        errors.GatedRepoError: f"{name} is gated: ask for access at https://huggingface.co/{name}, then run "
        "`hf auth login`",
        errors.RevisionNotFoundError: f"{name} has no revision {source.revision!r}; check its branches and tags, or "
        "leave it out",
        errors.RepositoryNotFoundError: f"{name!r} is neither a folder here nor a model on the hub; check the "
        "spelling, or if it is private run `hf auth login`",
        (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled): f"{name} is not in this machine's cache and the "
        "hub cannot be reached (or HF_HUB_OFFLINE is set): connect once to download it, give a local folder, or use "
        f"the embedded model {DEFAULT_MODEL!r}",
        errors.EntryNotFoundError: f"{name} has no config.json on the hub, so it is not a transformers model",
        errors.HFValidationError: f"{name!r} is not a possible hub id; it is written owner/name",
    }
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for kinds, said in meanings.items():
        if any(isinstance(link, kinds) for link in chain):
            return ModelError(said)
    if any("safetensors" in str(link) for link in chain):
        return ModelError(
            f"{name} has no safetensors weights, and pickled ones can run code when they are opened; if you "
            "trust it, convert it once with https://huggingface.co/spaces/safetensors/convert, or use "
            "another model"
        )
    return ModelError(f"{name} could not be had from the hub: {first_line(error)}")


_WORDS = "The weather today is fine."
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer, and where they came from.

    Attributes:
        source: Pinned, so that it names exactly what was loaded.
        model: The causal language model, in evaluation mode.
        tokenizer: Its tokenizer, set to pad on the left.
    """

    source: ModelSource
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(
    model: str,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    **options: Any,
) -> Loaded:
    """Load a model and its tokenizer from one and the same revision.

    Args:
        model: Hub id, local folder or the embedded model's name.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Run code that the model's repository brings.
        chat_template: See `load_tokenizer`.
        options: See `load_model`.

    Raises:
        ModelError: It cannot be loaded; the message says what to do.
    """
    source = pinned(resolve(model, revision))
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code, chat_template=chat_template)
    return Loaded(source, load_model(source, trust_remote_code=trust_remote_code, **options), tokenizer)


def load_tokenizer(
    source: ModelSource, *, trust_remote_code: bool = False, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, set to pad on the left.

    Args:
        source: What to load.
        trust_remote_code: Run code that the model's repository brings.
        chat_template: The text of a Jinja chat template, which takes the place of the tokenizer's own. Whatever depends
            on a template asks the tokenizer: prompts, the tokens that end a turn, what is thinking and what is answer.

    Returns:
        The tokenizer. One without a padding token gets its end-of-sequence token for that: it needs some id
        to fill rows with, and masks are never derived from it.

    Raises:
        ModelError: It cannot be loaded; the message says what to do.
    """
    from transformers import AutoTokenizer

    source = pinned(source)
    if source.base is not None:
        own = (Path(source.location) / "tokenizer_config.json").is_file()
        source = replace(source, kind="folder", base=None) if own else source.base
    try:
        # padding_side is not among what save_pretrained keeps, so it is given every time.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.location, padding_side="left", **_place(source, trust_remote_code)
        )
    except ModelError:
        raise
    except Exception as error:  # tokenizer conversion raises errors of several libraries
        raise _explained(error, source, "the tokenizer of ") from error
    if not tokenizer.encode(_WORDS):  # which some classes begin with where a folder has none of their files
        raise ModelError(
            f"the tokenizer of {source.id} knows no tokens: {source.location} lacks its files (tokenizer.json, or what "
            "its class reads); copy them there from where the model comes from"
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def load_model(
    source: ModelSource,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode, with its adapter on it where the source is one.

    Only safetensors are read: nothing is unpickled.

    Args:
        source: What to load.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``; see `resolve_dtype`.
        device: ``auto`` or a torch device such as ``cuda:1``; see `resolve_device`. Ignored under a device
            map.
        device_map: How to spread the model over devices, for accelerate; ``"auto"`` lets it decide.
        attn_implementation: transformers' name of the attention to use; its choice by default.
        trust_remote_code: Run code that the model's repository brings.

    Returns:
        The model.

    Raises:
        ModelError: It cannot be loaded, is not a causal language model, or its checkpoint lacks weights.
    """
    from transformers import AutoModelForCausalLM

    source = pinned(source)
    if source.base is not None:
        require_peft()
        same: dict[str, Any] = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
        base = load_model(source.base, dtype=dtype, device=device, device_map=device_map, **same)
        adapted: PreTrainedModel = put_on(base, Path(source.location)).get_base_model().eval()
        return adapted
    where = resolve_device(device)
    place = _place(source, trust_remote_code)
    config = _configuration(source, place)
    if device_map is None and getattr(config, "quantization_config", None) is not None:
        device_map = {"": str(where)}  # quantised weights cannot be moved after loading
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise ModelError("device maps and quantised models need accelerate: `pip install accelerate`")
    given = {"device_map": device_map, "attn_implementation": attn_implementation}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    options["dtype"] = resolve_dtype(dtype, where.type, _checkpoint_dtype(config))
    loader: Any = AutoModelForCausalLM  # what it returns depends on output_loading_info, unseen by type checkers
    try:
        model, report = loader.from_pretrained(
            source.location, config=config, use_safetensors=True, output_loading_info=True, **options, **place
        )
    except Exception as error:  # loading runs third-party code of many kinds
        raise _explained(error, source, "") from error
    _require_whole(report, source)
    if device_map is None:
        model = model.to(where)
    loaded: PreTrainedModel = model.eval()
    return loaded


def _configuration(source: ModelSource, place: dict[str, Any]) -> PretrainedConfig:
    """The configuration of a causal language model."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source.location, **place)
    except Exception as error:  # configurations are third-party code
        raise _explained(error, source, "the configuration of ") from error
    architectures = tuple(getattr(config, "architectures", None) or ())
    shown = ", ".join(architectures) or config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{source.id} is an encoder-decoder model ({shown}); only decoder-only (causal) chat models have "
            "the one residual stream that persona vectors live in"
        )
    mapped = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    of_their_own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    fitting = not architectures or any(a == mapped or a.endswith(_CAUSAL_ENDINGS) for a in architectures)
    if not of_their_own and (mapped is None or not fitting):
        raise ModelError(f"{source.id} is not a causal language model ({shown}); use a decoder-only chat model")
    return config


def resolve_device(device: str) -> torch.device:
    """Choose the device.

    Args:
        device: ``auto`` (CUDA, else MPS, else the CPU) or a torch device.

    Raises:
        ModelError: There is no such device here.
    """
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"{device!r} is not a device; use auto, cpu, cuda, cuda:N or mps") from error
    missing = (chosen.type == "cuda" and not cuda) or (chosen.type == "mps" and not mps)
    if missing or (chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count()):
        raise ModelError(f"there is no device {device!r} on this machine; use auto or cpu")
    return chosen


def resolve_dtype(dtype: str, device_type: str, checkpoint: torch.dtype | None) -> torch.dtype:
    """Choose the number format of the weights.

    ``auto`` is the checkpoint's own on CUDA and MPS (float32 where it does not say). On a CPU it is bfloat16
    where the CPU multiplies that in hardware (AVX-512 BF16, AMX), twice as fast in batches, and float32
    elsewhere, where 16-bit arithmetic is emulated and slow.

    Args:
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device_type: ``cpu``, ``cuda``, ``mps``.
        checkpoint: What the weights are stored in, or None where unknown.

    Raises:
        ModelError: The name is none of these.
    """
    import torch

    if dtype not in _DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of: {', '.join(_DTYPES)}")
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    if device_type != "cpu":
        return checkpoint or torch.float32
    return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    import torch

    # Where torch was told to use less of the CPU (ATEN_CPU_CAPABILITY), 16 bits are emulated, whatever the CPU has.
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    # Private names of torch, so any of them may be missing in another version: that means no.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, bool)()) for check in checks)


def stored_dtype(source: ModelSource) -> str:
    """The number format that a model's weights are stored in, by name; ``float32`` where that is not known.

    Args:
        source: The model; of an adapter it is the base model's.

    Raises:
        ModelError: Its configuration cannot be had.
    """
    source = pinned(source.base or source)
    found = str(_checkpoint_dtype(_configuration(source, _place(source, False)))).removeprefix("torch.")
    return found if found in _DTYPES else "float32"


def _place(source: ModelSource, trust_remote_code: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"local_files_only": source.is_local, "trust_remote_code": trust_remote_code}
    if source.revision is not None:
        options["revision"] = source.revision
    return options


def _checkpoint_dtype(config: PretrainedConfig) -> torch.dtype | None:
    import torch

    stored = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored, None)
    return stored if isinstance(stored, torch.dtype) else None


def _require_whole(report: dict[str, Any], source: ModelSource) -> None:
    """Refuse what transformers only warns of: weights filled with random numbers."""
    lacking = sorted(map(str, report.get("missing_keys") or ()))
    lacking += sorted(str(entry) for entry in report.get("mismatched_keys") or ())
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise ModelError(
            f"the checkpoint of {source.id} does not fit its config.json: {', '.join(lacking[:3])}{more} "
            "would have been random numbers; fetch it again, or correct the configuration"
        )


def _explained(error: Exception, source: ModelSource, what: str) -> ModelError:
    first = first_line(error)
    if "trust_remote_code" in str(error):
        return ModelError(f"{source.id} runs code of its own; if you trust it, pass trust_remote_code")
    if isinstance(error, ImportError):
        return ModelError(f"{what}{source.id} needs a package that is missing: {first}")
    if "does not recognize this architecture" in str(error):
        return ModelError(
            f"this transformers does not know the architecture of {source.id}; `pip install -U transformers` may help"
        )
    if source.kind == "hub" and isinstance(error, OSError):
        return hub_error(error, source)
    return ModelError(f"{what}{source.id} cannot be loaded from {source.location}: {type(error).__name__}: {first}")
