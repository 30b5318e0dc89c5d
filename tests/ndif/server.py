"""A real NDIF server on the loopback interface: redis, Ray, NDIF's controller and its API.

Run as a program it starts the server, prints one line of JSON when requests are answered, and stops everything once
its standard input closes. The tests start it so, since that end also comes when they are killed.

    python tests/ndif/server.py ENVIRONMENT FOLDER

Nothing but the standard library: the server's environment must not need ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

HERE = Path(__file__).resolve().parent
ENVIRONMENT = "PERSONA_LENS_NDIF_ENV"
PORT = "PERSONA_LENS_TEST_PORT"  # of the API, for a server that comes back at the same address
SECONDS_TO_START = 180.0
SECONDS_TO_STOP = 4.0
GIGABYTE = 10**9


class ServerError(Exception):
    """The server did not come up; says which part, and where its log is."""


def environment() -> Path:
    """Where the server's packages are: what the variable says, or the place where `make test-remote` puts them."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "persona-lens" / "ndif-server"
    return Path(os.environ.get(ENVIRONMENT, default)).expanduser()


def missing() -> str | None:
    """Why there can be no server here, in words; None when there can."""
    if not all((environment() / "bin" / name).is_file() for name in ("ndif", "redis-server")):
        return f"no NDIF server is installed in {environment()}; `make test-remote` installs it"
    return None


@contextlib.contextmanager
def serving(folder: Path, settings: Mapping[str, str] | None = None) -> Iterator[str]:
    """Run a server in a process of its own while the context is open.

    Args:
        folder: Where its logs go.
        settings: Environment variables for all of its parts, such as ``NDIF_DEFAULT_DTYPE``.

    Yields:
        Its address, such as ``http://127.0.0.1:40123``.

    Raises:
        ServerError: If it does not come up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), str(environment()), str(folder)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(settings or {})},
        start_new_session=True,  # a Ctrl-C in the terminal is for the tests; they end the server in order
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        answer = json.loads(process.stdout.readline() or '{"error": "the server process died"}')
        if "error" in answer:
            raise ServerError(answer["error"])
        yield answer["host"]
    finally:
        process.stdin.close()
        process.wait(timeout=60)
        process.stdout.close()


@dataclass
class Server:
    """The running parts, in the order in which they were started.

    Attributes:
        packages: The server's virtual environment.
        logs: One file for each part.
    """

    packages: Path
    logs: Path
    host: str = ""
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    # Ray makes sockets below this folder, and a socket's path may have 107 characters.
    _scratch: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="ndif-")))

    def start(self) -> None:
        """Start the parts one after the other, each when the one before it answers."""
        redis, ray, client, dashboard, agent, api = free_ports(6)
        api = int(os.environ.get(PORT, api))
        self.host = f"http://127.0.0.1:{api}"
        variables = self._variables(redis, ray, client)
        self._start("redis", _redis(redis), variables)
        self._until("redis", lambda: answers(redis))
        self._start("ray", [*self._tool("ray"), *_ray(ray, client, dashboard, agent, self._scratch)], variables)
        self._until("ray", lambda: answers(client))
        controller = [*self._tool("python"), "-m", "ndif.services.ray.deployments.controller.controller"]
        self._run("controller", controller, {**variables, "RAY_ADDRESS": f"127.0.0.1:{ray}"})
        options = ["--config", "python:ndif.services.api.gunicorn_conf", "--bind", f"127.0.0.1:{api}", "api:app"]
        self._start("api", [*self._tool("gunicorn"), *options], {**variables, "NDIF_SERVICE": "api"})
        self._until("api", lambda: responds(f"{self.host}/connected"))

    def stop(self) -> None:
        """Stop every part and what it started, the last one first."""
        for process in reversed(self._processes):
            _signal(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=SECONDS_TO_STOP)
            _signal(process, signal.SIGKILL)
            process.wait()
        self._processes.clear()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _tool(self, name: str) -> list[str]:
        return [str(self.packages / "bin" / name)]

    def _variables(self, redis: int, ray: int, client: int) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RAY_", "VIRTUAL"))}
        return {
            # What a caller sets in the environment counts.
            "NDIF_DEFAULT_DTYPE": "float32",
            "NDIF_STATUS_TTL_S": "1",
            **kept,
            "PATH": f"{self.packages / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(HERE / "shims"),
            "NDIF_REDIS_URL": f"redis://127.0.0.1:{redis}",
            "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{client}",
            "NDIF_RAY_HEAD_PORT": str(ray),
            "NDIF_CONTROLLER_IMPORT_PATH": "controller.Controller",
            "NDIF_DEFAULT_MODEL_ACTOR_CLASS": "cpu_model.CPUModelActor",
            # Any model may make room for any other at once, and none is counted larger than it is.
            "NDIF_MINIMUM_DEPLOYMENT_TIME_SECONDS": "0",
            "NDIF_DEFAULT_PADDING_BIAS": "0",
            # A store for large results is looked for at an address where nothing is.
            "NDIF_OBJECT_STORE_URL": "http://127.0.0.1:9",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_DEFAULT_REGION": "us-east-1",
            "HF_HUB_OFFLINE": "1",
            "HOME": str(self._scratch),
            "RAY_USAGE_STATS_ENABLED": "0",
            "GRPC_ENABLE_FORK_SUPPORT": "0",  # with it, connections to processes that Ray forks sometimes hang
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
        }

    def _start(self, name: str, command: Sequence[str], variables: Mapping[str, str]) -> None:
        with self._log(name) as log:
            # A session of its own makes the part and all that it starts one group, which can be ended together.
            process = subprocess.Popen(
                command, env=variables, cwd=self._scratch, stdout=log, stderr=log, start_new_session=True
            )
        self._processes.append(process)

    def _run(self, name: str, command: Sequence[str], variables: Mapping[str, str]) -> None:
        self._start(name, command, variables)
        if self._processes.pop().wait(timeout=SECONDS_TO_START) != 0:
            raise ServerError(self._failure(name))

    def _until(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while not ready():
            if time.monotonic() > deadline or self._processes[-1].poll() is not None:
                raise ServerError(self._failure(name))
            time.sleep(0.1)

    def _log(self, name: str) -> IO[bytes]:
        return (self.logs / f"{name}.log").open("wb")

    def _failure(self, name: str) -> str:
        log = self.logs / f"{name}.log"
        end = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
        return f"{name} did not come up; the end of {log}:\n{end}"


def _redis(port: int) -> list[str]:
    return ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]


def _ray(port: int, client: int, dashboard: int, agent: int, scratch: Path) -> list[str]:
    # NDIF places models by the memory that nodes claim to have, and passes over a node without a GPU: one is made up.
    resources = {"head": 10, "cuda_memory_bytes": 64 * GIGABYTE, "cpu_memory_bytes": 64 * GIGABYTE}
    options = {
        "node-ip-address": "127.0.0.1",
        "port": port,
        "ray-client-server-port": client,
        "min-worker-port": 0,  # any free one
        "max-worker-port": 0,
        "num-cpus": 64,  # what counts is that every actor gets one; they work in turn
        "num-gpus": 1,
        "resources": json.dumps(resources),
        "object-store-memory": 200_000_000,
        "include-dashboard": "true",  # the controller asks its API for the state of the actors
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "temp-dir": scratch / "ray",
    }
    return ["start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]


def free_ports(count: int) -> list[int]:
    """Ports on which nothing listens now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def answers(port: int) -> bool:
    """Whether something accepts connections there."""
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


def responds(url: str) -> bool:
    """Whether a GET succeeds."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def main() -> int:
    """Serve until standard input closes."""
    server = Server(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
    # The signals that end a process in the ordinary way must not leave the parts behind.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    try:
        server.start()
        print(json.dumps({"host": server.host}), flush=True)
        sys.stdin.read()
    except ServerError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    finally:
        server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
