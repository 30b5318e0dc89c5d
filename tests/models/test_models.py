"""Which weights to load, and loading them: names, folders, the hub, and everything that can be wrong with each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from persona_lens.core.errors import PersonaLensError
from persona_lens.models import (
    ModelError,
    ModelSource,
    load_model,
    load_tokenizer,
    pinned,
    resolve,
    resolve_device,
    resolve_dtype,
)
from persona_lens.models.source import folder_content
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama as save_pretrained leaves it, with a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    untyped: Any = LlamaForCausalLM
    untyped(LlamaConfig(vocab_size=64, num_key_value_heads=2, **shape)).save_pretrained(folder)
    words = {f"w{i}": i for i in range(62)} | {"[UNK]": 62, "[END]": 63}
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")), eos_token="[END]")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_importing_loads_nothing_heavy() -> None:
    script = (
        "import sys, persona_lens.models\n"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'httpx', 'rich') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == "[]"


def test_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve(str(folder))
    assert (source.kind, source.id, source.location) == ("folder", "model", str(folder.resolve()))
    assert source.identity == f"folder:{folder_content(folder)}"
    assert source.is_local
    assert pinned(source) is source
    monkeypatch.chdir(folder.parent)
    assert resolve("model") == resolve("./model") == source


def test_hub_id_is_taken_without_asking_the_hub() -> None:
    source = resolve("owner/some-model_1.5B", "v2")
    assert source == ModelSource("owner/some-model_1.5B", "owner/some-model_1.5B", "hub", revision="v2")
    assert source.identity is None
    assert not source.is_local
    assert resolve("gpt2").kind == "hub"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "no model given"),
        ("smollm2-135M", "did you mean 'smollm2-135m'"),
        ("smollm2", "did you mean 'smollm2-135m'"),
        ("./nowhere", "there is no folder './nowhere'"),
        ("/nowhere/at/all", "there is no folder '/nowhere/at/all'"),
        ("../nowhere", "there is no folder"),
        ("~/nowhere-at-all", "there is no folder"),
        ("a/b/c", "neither a folder here nor a hub id"),
        ("two words", "neither a folder here nor a hub id"),
    ],
)
def test_names_that_stand_for_nothing(name: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        resolve(name)
    assert isinstance(caught.value, PersonaLensError)


def test_revision_of_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="belongs to a hub model"):
        resolve(str(folder), "main")


def test_folders_that_hold_no_model(folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        resolve(str(folder / "config.json"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled .bin files.*python -c"):
        resolve(str(folder))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="the weights are missing"):
        resolve(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve(str(folder))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="names no base model"):
        resolve(str(folder))


def test_content_knows_a_copy_from_a_finetune(saved: Path, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    assert folder_content(folder) == folder_content(saved)
    (folder / "tokenizer.json").write_text("{}")
    assert folder_content(folder) == folder_content(saved)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name] + 1e-3  # same names, shapes and file size
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    finetuned = folder_content(folder)
    assert finetuned != folder_content(saved)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    assert folder_content(folder) != finetuned


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02" + bytes(7) + b"[]", b"truncated"])
def test_broken_safetensors_are_named(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="is not a whole safetensors file"):
        resolve(str(folder))


def test_cut_short_safetensors_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    with pytest.raises(ModelError, match="cut short"):
        resolve(str(folder))


def test_load(saved: Path) -> None:
    source = resolve(str(saved))
    tokenizer, model = load_tokenizer(source), load_model(source, dtype="float32", device="cpu")
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token == tokenizer.eos_token == "[END]"
    assert not model.training
    assert model.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert load_model(source, dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    eager = load_model(source, dtype="float32", device="cpu", attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"


def test_device_map(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    source = resolve(str(saved))
    assert load_model(source, device_map={"": "cpu"}, device="cpu").device == torch.device("cpu")
    from importlib import util

    real = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "accelerate" else real(name, *rest))
    with pytest.raises(ModelError, match="pip install accelerate"):
        load_model(source, device_map="auto")


def _rewrite_config(folder: Path, **changes: Any) -> ModelSource:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return resolve(str(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "encoder-decoder"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "not a causal language model"),
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, "not a causal language model"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
        ({"model_type": "made-up-9"}, "does not know the architecture"),
        ({"vocab_size": 65}, "would have been random numbers|cannot be loaded"),
        ({"num_hidden_layers": 3}, "would have been random numbers"),
    ],
)
def test_models_that_cannot_be_used(folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load_model(_rewrite_config(folder, **changes), dtype="float32", device="cpu")


def test_code_of_the_repository_is_not_run_unasked(folder: Path) -> None:
    changes = {"model_type": "made-up-9", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "own.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(ModelError, match="pass trust_remote_code"):
        load_model(_rewrite_config(folder, **changes), device="cpu")


def test_folder_without_a_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="the tokenizer of model cannot be loaded"):
        load_tokenizer(resolve(str(folder)))


def test_folder_whose_tokenizer_is_empty(tmp_path: Path) -> None:
    """What GPT-2's class makes of a folder without any of its files."""
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"the tokenizer of model knows no tokens: .* lacks its files"):
        load_tokenizer(resolve(str(tmp_path / "model")))


def test_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("float32", "bfloat16", "float16"):
        assert resolve_dtype(name, "cpu", None) == getattr(torch, name)
    assert resolve_dtype("auto", "cuda", torch.float16) == torch.float16
    assert resolve_dtype("auto", "mps", None) == torch.float32
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for amx, avx, expected in ((False, False, "float32"), (True, False, "bfloat16"), (False, True, "bfloat16")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx, raising=False)
        assert resolve_dtype("auto", "cpu", torch.float16) == getattr(torch, expected)
    # The CPU has them, but torch was told not to use them.
    for capability in ("AVX2", "DEFAULT"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert resolve_dtype("auto", "cpu", torch.bfloat16) == torch.float32
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert resolve_dtype("auto", "cpu", torch.bfloat16) == torch.float32
    with pytest.raises(ModelError, match="auto, float32, bfloat16, float16"):
        resolve_dtype("fp8", "cpu", None)


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ModelError, match="no device 'cuda'"):
        resolve_device("cuda")
    with pytest.raises(ModelError, match="is not a device"):
        resolve_device("graphics card")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ModelError, match="no device 'cuda:2'"):
        resolve_device("cuda:2")


COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_SCRIPT = """
import json, sys
from persona_lens.models import ModelError, load_model, pinned, resolve

said = {}
for name in sys.argv[1:]:
    model, _, revision = name.partition("@")
    try:
        source = pinned(resolve(model, revision or None))
        said[name] = source.identity
        load_model(source, device="cpu")
    except ModelError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as is needed to be refused by it in every way."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        codes = {
            "gated": (403, "GatedRepo"),
            "absent": (404, "RepoNotFound"),
            "lacks-revision": (404, "RevisionNotFound"),
            "lacks-config": (404, "EntryNotFound"),
        }
        status, code = next((v for k, v in codes.items() if f"/{k}/" in self.path), (404, "EntryNotFound"))
        body = b""
        if "/pickled/" in self.path and self.path.endswith("/config.json"):
            status, code, body = 200, "", b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
        self.send_response(status)
        self.send_header("X-Error-Code" if code else "ETag", code or '"abc"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def ask_hub(endpoint: str, home: Path, *names: str, offline: bool = False) -> dict[str, str]:
    """Run in a process of its own, since the hub's client reads its settings when it is imported."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    command = [sys.executable, "-c", HUB_SCRIPT, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=home, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    said: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_what_the_hub_refuses_is_explained(hub: str, tmp_path: Path) -> None:
    said = ask_hub(hub, tmp_path, "o/gated", "o/absent", "o/lacks-revision@v9", "o/lacks-config", "o/pickled")
    assert "is gated" in said["o/gated"]
    assert "hf auth login" in said["o/gated"]
    assert "neither a folder here nor a model on the hub" in said["o/absent"]
    assert "has no revision 'v9'" in said["o/lacks-revision@v9"]
    assert "has no config.json on the hub" in said["o/lacks-config"]
    assert "no safetensors weights" in said["o/pickled"]


def test_hub_out_of_reach_is_explained(tmp_path: Path) -> None:
    said = ask_hub("http://127.0.0.1:9", tmp_path, "o/model")
    assert "the hub cannot be reached" in said["o/model"]
    assert "smollm2-135m" in said["o/model"]


def test_hub_model_in_the_cache_loads_offline_and_is_known_by_its_commit(saved: Path, tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--o--tiny"
    shutil.copytree(saved, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    said = ask_hub("http://127.0.0.1:9", tmp_path, "o/tiny", f"o/tiny@{COMMIT}", "o/model", offline=True)
    assert "HF_HUB_OFFLINE" in said.pop("o/model")
    assert said == {"o/tiny": f"hub:{COMMIT}", f"o/tiny@{COMMIT}": f"hub:{COMMIT}"}
