"""A server of the target that a stage starts itself: on loopback, logged to a file.

It runs under a supervisor, so that it ends with this process, however that ends, and frees its GPU.
One that dies while there is work is started again; what it was working on is requested again, as
with any server that is unreachable.
"""

import contextlib
import contextvars
import logging
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import httpx

from deepspec.config.run import RunConfig
from deepspec.config.servers import ServersConfig
from deepspec.errors import ChildFailed, ConfigError, DeepSpecError, TransientError
from deepspec.process.launch import run_child
from deepspec.process.machine import LOOPBACK, free_port
from deepspec.process.scopes import Scope, scope

log = logging.getLogger(__name__)

# `serve_command` fills in what stands in braces. Without access logs, where there is a switch: a
# server's log then ends with the reason of its death.
COMMANDS = {
    "vllm": "vllm serve {model} --served-model-name {name}"
    " --host {host} --port {port} --dtype {dtype} --disable-uvicorn-access-log",
    "sglang": "{python} -m sglang.launch_server --model-path {model} --served-model-name {name}"
    " --host {host} --port {port} --dtype {dtype} --log-level-http warning",
    "transformers": "transformers serve {model} --host {host} --port {port} --dtype {dtype}",
}
LOOK_S = 0.2
RESTARTS = 5  # of one server, by one lane


@contextlib.contextmanager
def serving(
    config: RunConfig,
    *,
    model: str,
    logs: Path,
    options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Iterator[tuple[ServersConfig, Callable[[], None]]]:
    """The settings with a server of `model` as the only endpoint, and a check that it is alive.

    The server is up for the length of this block. `options` are added to its command, `env` to its
    environment.

    Raises:
        ConfigError: its program is not installed.
        ChildFailed: it ended before it was up; its last lines are in the message.
        TransientError: it was not up within `resources.servers.start_deadline_s`.
    """
    servers, port = config.resources.servers, free_port()
    command = [*serve_command(config, model=model, port=port), *options]
    log_path = logs / f"serve-{port}.log"
    log.info("starting a server: %s (its log is %s)", shlex.join(command), log_path)
    url = f"http://{LOOPBACK}:{port}"
    with scope() as owner:
        server = _Server(command, log_path, owner, env or {})
        server.wait_until_up(f"{url}/health", servers.start_deadline_s)
        changes = {
            "endpoints": (f"{url}/v1",),
            "model_name": model,
            "dialect": servers.start,
            # one that is started again takes as long as the first
            "lost_s": max(servers.lost_s, servers.start_deadline_s),
        }
        yield servers.model_copy(update=changes), server.check


def serve_command(config: RunConfig, *, model: str, port: int) -> list[str]:
    """The server's command line.

    Raises:
        ConfigError: its program is not installed.
    """
    program, target = config.resources.servers.start, config.target
    parts = list(config.resources.servers.start_command)
    if not parts:
        parts, device = COMMANDS[program].split(), config.resources.devices.type
        if target.revision and program != "transformers":
            parts += ["--revision", target.revision]
        num_gpus = config.resources.devices.gpus_per_lane
        if num_gpus > 1 and program != "transformers":
            parts += ["--tensor-parallel-size", str(num_gpus)]
        if program == "transformers" and device != "auto":
            parts += ["--device", device]
    values = {
        "{model}": model,
        "{name}": model,
        "{host}": LOOPBACK,
        "{port}": str(port),
        "{dtype}": target.dtype,
        "{python}": sys.executable,
    }
    for placeholder, value in values.items():
        parts = [part.replace(placeholder, value) for part in parts]
    # pip puts this environment's programs there, whether it is on the PATH or not
    folder = str(Path(sys.executable).parent)
    found = shutil.which(parts[0], path=folder) or shutil.which(parts[0])
    if found is None:
        raise ConfigError(
            f"there is no program {parts[0]!r} here",
            where=f"resources.servers.start {program}",
            fix=f"install {program}, or give the command as resources.servers.start_command",
        )
    return [found, *parts[1:]]


class _Server:
    """One server, run by a thread that starts it again when it dies; ends with its scope."""

    def __init__(
        self, command: list[str], log_path: Path, owner: Scope, env: Mapping[str, str]
    ) -> None:
        self.command = command
        self.env = env
        self.log_path = log_path
        self.owner = owner
        self.error: DeepSpecError | None = None
        self.was_up = False
        self.given_up: DeepSpecError | None = None
        # the scope is a context variable, and a thread begins without any
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self._run,), name="server", daemon=True).start()

    def _run(self) -> None:
        for restart in range(RESTARTS + 1):
            self.error = self._run_once()
            if not self.was_up or self.owner.closed:
                return
            if restart < RESTARTS:
                log.warning(
                    "the server died (%s) and is started again, %d of %d times",
                    self.error.what,
                    restart + 1,
                    RESTARTS,
                )
        self.given_up = self.error

    def _run_once(self) -> DeepSpecError:
        """Run the server until it ends; returns why it did."""
        what, fix = "the server ended by itself", "see its log"
        try:
            run_child(
                self.command,
                on_event=lambda event: None,
                on_line=lambda line: None,
                env=self.env,
                log_path=self.log_path,
            )
        except DeepSpecError as error:
            return error
        except OSError as error:  # its log cannot be written
            what, fix = f"{type(error).__name__}: {error}", "check the disk of its log"
        return ChildFailed(what, where=self._where, fix=fix)

    @property
    def _where(self) -> str:
        return f"its log is {self.log_path}"

    def check(self) -> None:
        """Raise TransientError if the server died too often to be started again."""
        if self.given_up is not None:
            raise TransientError(
                f"the server died {RESTARTS + 1} times; the last error: {self.given_up.what}",
                where=self._where,
                fix="see its log; rows that were answered are kept",
            )

    def wait_until_up(self, url: str, deadline_s: float) -> None:
        """Return once the server reports that it is healthy."""
        deadline = time.monotonic() + deadline_s
        while True:
            if self.error is not None:
                raise self.error
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(url, timeout=2.0, trust_env=False).is_success:
                    self.was_up = True
                    return
            if time.monotonic() > deadline:
                raise TransientError(
                    f"the server was not up within {deadline_s:g} s",
                    where=self._where,
                    fix="raise resources.servers.start_deadline_s, or see its log",
                )
            time.sleep(LOOK_S)
