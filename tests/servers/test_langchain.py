"""LangChain, in an environment of its own, speaks to our server as to any other of OpenAI's protocol."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from persona_lens.serve.server import Running
from tests.serve.running import HELLO, expected, workbench
from tests.servers.server import environment, missing

EDITS = "evil@1:+2"


def test_its_replies_are_steered(tmp_path: Path) -> None:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    script = Path(__file__).with_name("langchain_client.py")
    with Running(workbench()) as running:
        asked = [f"{running.address}/v1", running.server.name, EDITS, HELLO[0]["content"]]
        found = subprocess.run(
            [str(environment() / "bin" / "python"), str(script), *asked],
            env={"PATH": os.environ["PATH"], "OPENAI_API_KEY": running.token, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert found.returncode == 0, found.stderr
        wanted = expected(running, EDITS)
    assert json.loads(found.stdout) == {"whole": wanted, "streamed": wanted}
    assert wanted
