"""A shard: tensors of one batch in a safetensors file that knows which batch it is of, and whether it is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, uint8

from persona_lens.artifacts import header_text, save_tensors
from persona_lens.runs import RunError

KIND = "persona_lens_batch"
ADVICE = "remove it, and the same command makes it again"


def pack_shard(tensors: Mapping[str, Tensor], identity: Mapping[str, Any]) -> bytes:
    """The bytes of a shard.

    Args:
        tensors: By name.
        identity: JSON values that tell the batch from all others.
    """
    return save_tensors(tensors, KIND, header_text({**identity, "sha256": _checksum(tensors)}))


def load_shard(file: Path, identity: Mapping[str, Any]) -> dict[str, Tensor]:
    """What `pack_shard` packed with that identity.

    Raises:
        RunError: If the file is missing or damaged, or of another batch.
    """
    header, tensors = open_shard(file)
    if header != json.loads(json.dumps(identity)):
        raise RunError(f"{file} is of another batch; {ADVICE}")
    return tensors


def open_shard(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `pack_shard` packed: the identity of the batch, and the tensors.

    Raises:
        RunError: If the file is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            header = json.loads((opened.metadata() or {}).get(KIND, "null"))
            tensors = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file} is missing or damaged ({error}); {ADVICE}") from error
    if not isinstance(header, dict) or header.pop("sha256", None) != _checksum(tensors):
        raise RunError(f"{file} is damaged; {ADVICE}")
    return header, tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().tobytes())
    return whole.hexdigest()
