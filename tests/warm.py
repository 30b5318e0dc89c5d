"""The ``persona-lens`` command, run in forks of one process that has already imported everything.

A process of its own takes seconds to import torch, however little the command does, and examples consist of dozens of
them. What is imported when is tested elsewhere, with whole processes.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# Takes one command a connection, with the caller's streams, and answers with its exit code.
_SERVER = """
import json, os, signal, socket, sys, traceback
import torch, transformers
import persona_lens.cli, persona_lens.extraction, persona_lens.reports, persona_lens_transformers.adapter
from transformers.models.llama import modeling_llama
torch.set_num_threads(1)

def run(request, streams):
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdin, sys.stdout, sys.stderr = (open(n, mode, closefd=False) for n, mode in enumerate("rww"))
    sys.argv = ["persona-lens", *request["arguments"]]
    try:
        persona_lens.cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
listener.settimeout(5)
parent = os.getppid()
print("ready", flush=True)
while os.getppid() == parent:  # the tests may be killed
    try:
        connection, _ = listener.accept()
    except TimeoutError:
        continue
    with connection:
        data, streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            code = 1
            try:
                code = run(json.loads(data), streams)
            except BaseException:  # what a command of its own would print
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                connection.send(bytes([code]))
                os._exit(0)
        for stream in streams:
            os.close(stream)
"""

_COMMAND = """#!{python} -SE
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
request = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
sys.exit(connection.recv(1)[0])
"""


@contextmanager
def warm_command(folder: Path, environment: Mapping[str, str]) -> Iterator[Path]:
    """A folder for ``PATH`` with a ``persona-lens`` that takes no time to start.

    Args:
        folder: An empty folder.
        environment: What the process that imports everything runs under; each command has its caller's.
    """
    address = folder / "socket"
    command = folder / "bin" / "persona-lens"
    command.parent.mkdir(parents=True)
    command.write_text(_COMMAND.format(python=sys.executable, address=str(address)), encoding="utf-8")
    command.chmod(0o755)
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(address)], stdout=subprocess.PIPE, text=True, env=dict(environment)
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline().strip() == "ready"
            yield command.parent
        finally:
            server.kill()
