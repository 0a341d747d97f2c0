"""Sampling engine on a vLLM OpenAI-compatible server, which this process starts for itself alone."""

import asyncio
import contextlib
import http.client
import json
import os
import secrets
import select
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

from contracts import resident
from contracts.attempt import beat
from contracts.errors import TransientError
from contracts.faults import Fault
from contracts.processes import end_groups
from generation.config import GenerationConfig
from generation.engine import Answer, EngineSettings, GenerationRequest
from generation.server_key import KEY, RequireKey
from generation.vllm_engine import (
    UPDATE_SECONDS,
    UpdatableEngine,
    engine_arguments,
    reason_of,
    sampling_parameters,
    structured_outputs,
)
from modeling.vllm_process import set_environment

LOG_TAIL_LINES = 40
"""Lines of the server's log in error messages."""
PROFILE_SECONDS = 600.0
"""Timeout of the server for writing a trace."""
HEALTH_SECONDS = 1.0
"""Interval at which the server is asked for its health while it computes a response."""


class VllmServer(UpdatableEngine):
    """Starts a server on a free loopback port, sends it requests, and stops it."""

    def __init__(self, config: GenerationConfig, settings: EngineSettings) -> None:
        set_environment(on_gpu=settings.on_gpu, parts=config.tensor_parallel)
        self._log = settings.log.open("w+b")  # kept open, to be read even after the stage's directory has been renamed
        self._stop_ids = list(settings.stop_ids)
        self._guided = structured_outputs(config)
        self._model = str(config.policy)
        self._key = secrets.token_urlsafe(32)
        self._address = f"http://127.0.0.1:{_free_port()}"
        arguments = engine_arguments(config, settings)
        self.dtype, self.max_length = settings.dtype, arguments["max_model_len"]
        start = time.monotonic()
        self._process = self._start(arguments, on_gpu=settings.on_gpu)
        try:
            self._wait_until_healthy(config.startup_seconds)
            self._update_timeout = UPDATE_SECONDS + 5 * (time.monotonic() - start)
        except BaseException:
            self.close()
            raise

    def _start(self, arguments: dict[str, Any], *, on_gpu: bool) -> "subprocess.Popen[bytes]":
        arguments = {**arguments, "host": "127.0.0.1", "port": self._address.rpartition(":")[2]}
        flags = [flag for name, value in arguments.items() for flag in _flags(name.replace("_", "-"), value)]
        flags += ["--disable-log-stats", "--disable-uvicorn-access-log"]
        flags.append(f"--middleware={RequireKey.__module__}.{RequireKey.__name__}")
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags]
        # The HTTP paths that reach workers and caches exist only in development mode.
        variables = {KEY: self._key, "VLLM_SERVER_DEV_MODE": "1"}
        if not on_gpu:
            variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # saves a process
        with resident.outliving_attempt():
            return subprocess.Popen(
                [sys.executable, "-m", "generation.guard", str(os.getpid()), *command],
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_until_healthy(self, seconds: float) -> None:
        """Poll /health.

        Raises:
            RuntimeError: the server exited, or the time is over.
        """
        deadline = time.monotonic() + seconds
        while not self._healthy():
            if self._process.poll() is not None:
                raise RuntimeError(f"the vLLM server ended while it was starting. From its log:\n{self._log_tail()}")
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"the vLLM server was not healthy after startup_seconds={seconds:g}. Raise it for a large model. "
                    f"From its log:\n{self._log_tail()}"
                )
            time.sleep(0.2)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._address}/health", timeout=5):
                return True
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False

    def generate(self, requests: Sequence[GenerationRequest], batch: str) -> Sequence[list[Answer] | Fault]:
        """Answer all requests, sent at once; the server batches them as they arrive."""
        return asyncio.run(self._generate([self._body(request, batch) for request in requests], requests))

    async def _generate(
        self, bodies: list[dict[str, Any]], requests: Sequence[GenerationRequest]
    ) -> Sequence[list[Answer] | Fault]:
        import aiohttp

        session = aiohttp.ClientSession(
            self._address,
            headers={"Authorization": f"Bearer {self._key}"},
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
        )
        async with session:

            async def complete(body: dict[str, Any], request: GenerationRequest) -> list[Answer] | Fault:
                async with session.post("/v1/completions", json=body) as response:
                    if response.status != 200:
                        problem = f"answered {response.status}: {await response.text()}"
                        return Fault(RuntimeError(f"the vLLM server {problem}. From its log:\n{self._log_tail()}"))
                    found = _answers((await response.json())["choices"], request)
                    beat()
                    return found

            try:
                return await asyncio.gather(*map(complete, bodies, requests))
            except aiohttp.ClientError as error:
                raise ConnectionError(
                    f"the vLLM server is gone ({error}). From its log:\n{self._log_tail()}"
                ) from error

    def _body(self, request: GenerationRequest, batch: str) -> dict[str, Any]:
        """A request to /v1/completions with every parameter, so that no default of the server's is used."""
        return {
            "model": self._model,
            "prompt": list(request.prompt_ids),
            **sampling_parameters(request, self._stop_ids),
            **({"structured_outputs": self._guided} if self._guided else {}),
            "logprobs": 0,
            "return_token_ids": True,
            "cache_salt": batch,
        }

    def _log_tail(self) -> str:
        """The first errors in the log, which name the cause; without errors, its last lines."""
        content = os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0)
        lines = [line[:300] for line in content.decode(errors="replace").splitlines()]
        errors = [line for line in lines if " ERROR " in line]
        return "\n".join(errors[:LOG_TAIL_LINES] or lines[-LOG_TAIL_LINES:])

    def call_workers(self, method: str, *arguments: str) -> list[Any]:
        """Call a method of each worker by HTTP."""
        body = {"method": method, "args": arguments, "timeout": self._update_timeout}
        found: list[Any] = self._post("/collective_rpc", body, self._update_timeout)["results"]
        return found

    def sequence_logprobs(self, ids: list[int]) -> list[float]:
        """Compute them as the log-probabilities of a prompt."""
        body = {"model": self._model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        (choice,) = self._post("/v1/completions", body, self._update_timeout)["choices"]
        return [choice["prompt_logprobs"][place][str(ids[place])]["logprob"] for place in range(1, len(ids))]

    def reset(self) -> None:
        """Clear the prefix cache."""
        if not self._post("/reset_prefix_cache", {}, self._update_timeout)["success"]:
            raise RuntimeError("vLLM's server did not reset its prefix cache")

    @contextlib.contextmanager
    def profile(self, name: str) -> Iterator[None]:
        """Trace each worker with vLLM's integration of torch's profiler, controlled by HTTP."""
        self._post("/start_profile", {"profile_prefix": name}, PROFILE_SECONDS)
        try:
            yield
        finally:
            self._post("/stop_profile", {}, PROFILE_SECONDS)

    def _post(self, path: str, body: dict[str, Any], seconds: float) -> Any:
        """Post JSON, and return the JSON response; None for an empty one.

        Raises:
            TransientError: the server has exited, or does not respond in time.
            RuntimeError: it responds with an error.
        """
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        connection = http.client.HTTPConnection(self._address.partition("//")[2], timeout=seconds)
        deadline = time.monotonic() + seconds
        try:
            connection.request("POST", path, json.dumps(body), headers)
            while not select.select([connection.sock], [], [], HEALTH_SECONDS)[0]:
                if self._is_dead():
                    raise ConnectionError("its engine has died")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not within {seconds:.0f} s")
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise TransientError(
                f"the vLLM server does not answer to {path} ({error}). From its log:\n{self._log_tail()}"
            ) from error
        finally:
            connection.close()
        if response.status != 200:
            problem = f"answered {response.status} to {path}: {content.decode(errors='replace')[:300]}"
            raise RuntimeError(f"the vLLM server {problem}. From its log:\n{self._log_tail()}")
        return json.loads(content or b"null")

    def _is_dead(self) -> bool:
        """Whether the server reports that its engine has died, or refuses connections, as it does while it shuts down;
        before it exits, it waits until the open ones are closed."""
        try:
            with urllib.request.urlopen(f"{self._address}/health", timeout=5):
                return False
        except urllib.error.HTTPError:
            return True
        except urllib.error.URLError as error:
            return isinstance(error.reason, ConnectionRefusedError)
        except (TimeoutError, ConnectionError):  # it may be busy
            return False

    def close(self) -> None:
        """Stop the server and all of its processes."""
        end_groups([self._process], grace=10.0)
        self._log.close()


def _answers(choices: list[dict[str, Any]], request: GenerationRequest) -> list[Answer]:
    return [
        Answer(
            tuple(choice["token_ids"]),
            tuple(choice["logprobs"]["token_logprobs"]),
            reason,
            request.seed + choice["index"],
            stop_string,
        )
        for choice in sorted(choices, key=lambda choice: int(choice["index"]))
        for reason, stop_string in [reason_of(choice["finish_reason"], choice["stop_reason"])]
    ]


def _flags(name: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    if isinstance(value, dict):
        value = json.dumps(value)
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}={value}"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
