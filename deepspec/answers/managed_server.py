"""A server of the target that the answers stage starts for itself: on loopback, logged to a file,
always taken down.

It runs under `guard`, so that it ends with this process, however that ends, and frees its GPU. One
that dies while there is work is started again; what was asked of it meanwhile is asked again, as
with any server that is away.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.side_files import folder_beside
from deepspec.config.run import RunConfig
from deepspec.errors import ChildFailed, ConfigError, DeepSpecError, TransientError
from deepspec.process.launch import Scope, run_child, scope
from deepspec.process.machine import LOOPBACK, free_port
from deepspec.target.chat import target_folder

log = logging.getLogger(__name__)

COMMANDS = {
    "vllm": "vllm serve {model} --served-model-name {name} --host {host} --port {port} --dtype {dtype}",
    "sglang": "{python} -m sglang.launch_server --model-path {model} --served-model-name {name} --host {host} --port {port} "
    "--dtype {dtype}",
    "transformers": "transformers serve {model} --host {host} --port {port} --dtype {dtype}",
}
LOOK_S = 0.2
Check = Callable[[], None]
RESTARTS = 5  # of one server, by one lane


@contextlib.contextmanager
def serving(config: RunConfig, artifact: Artifact) -> Iterator[tuple[RunConfig, Check]]:
    """The run with a server of its own as its only endpoint, up for the length of this block, and a
    look at whether it still is.

    Raises:
        ConfigError: its program is not installed.
        ChildFailed: it ended before it was up; its last lines are in the message.
        TransientError: it was not up within `resources.servers.start_deadline_s`.
    """
    port, settings = free_port(), config.resources.servers
    name = str(target_folder(config) or config.target.model)
    command = serve_command(config, model=name, port=port)
    path = folder_beside(artifact, "logs") / f"serve-{port}.log"
    log.info("starting a server: %s (its log is %s)", shlex.join(command), path)
    with scope() as mine:
        server = _Server(command, path, mine)
        server.wait(f"http://{LOOPBACK}:{port}/health", settings.start_deadline_s)
        at = {
            "endpoints": (f"http://{LOOPBACK}:{port}/v1",),
            "model_name": name,
            "dialect": settings.start,
        }
        # one that is started again takes as long as the first
        patience = {"lost_s": max(settings.lost_s, settings.start_deadline_s)}
        servers = settings.model_copy(update={**at, **patience})
        resources = config.resources.model_copy(update={"servers": servers})
        yield config.model_copy(update={"resources": resources}), server.check


def serve_command(config: RunConfig, *, model: str, port: int) -> list[str]:
    """The server's command line.

    Raises:
        ConfigError: there is no such program here.
    """
    settings, target = config.resources.servers, config.target
    device = config.resources.devices.type
    words = list(settings.start_command) or COMMANDS[settings.start].split()
    if not settings.start_command:
        if target.revision and settings.start != "transformers":
            words += ["--revision", target.revision]
        if settings.start == "transformers" and device != "auto":
            words += ["--device", device]
    filled = {
        "model": model,
        "name": model,
        "host": LOOPBACK,
        "port": str(port),
        "dtype": target.dtype,
        "python": sys.executable,
    }
    for key, value in filled.items():
        words = [word.replace(f"{{{key}}}", value) for word in words]
    # where pip puts the programs of this environment, on the PATH or not
    beside = Path(sys.executable).parent
    program = shutil.which(words[0], path=str(beside)) or shutil.which(words[0])
    if program is None:
        fix = f"install {settings.start}, or give the command as resources.servers.start_command"
        raise ConfigError(
            f"there is no program {words[0]!r} here",
            where=f"resources.servers.start {settings.start}",
            fix=fix,
        )
    return [program, *words[1:]]


class _Server:
    """One server in a thread of its own, started again when it dies; ends with the scope that
    it was made in.
    """

    def __init__(self, command: list[str], log_path: Path, owner: Scope) -> None:
        self.command, self.log_path, self.owner = command, log_path, owner
        self.error: DeepSpecError | None = None
        self.up = self.given_up = False
        # the scope is found by context, and a thread begins without one
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self._run,), name="server", daemon=True).start()

    def _run(self) -> None:
        for restart in range(RESTARTS + 1):
            try:
                run_child(
                    self.command,
                    on_event=lambda event: None,
                    on_line=lambda line: None,
                    log_path=self.log_path,
                )
                self.error = ChildFailed(
                    "the server ended by itself",
                    where=f"its log is {self.log_path}",
                    fix="see its log",
                )
            except DeepSpecError as error:
                self.error = error
            except OSError as error:  # its log cannot be written
                self.error = ChildFailed(
                    f"{type(error).__name__}: {error}",
                    where=f"its log is {self.log_path}",
                    fix="see that disk",
                )
            if not self.up or self.owner.closed:
                return
            if restart < RESTARTS:
                log.warning(
                    "the server died (%s) and is started again, %d of %d times",
                    self.error.what,
                    restart + 1,
                    RESTARTS,
                )
        self.given_up = True

    def check(self) -> None:
        """Raise TransientError if the server died too often to be started again: nobody should
        wait for it.
        """
        if self.given_up and self.error is not None:
            what = f"the server died {RESTARTS + 1} times, the last time because {self.error.what}"
            raise TransientError(
                what,
                where=f"its log is {self.log_path}",
                fix="see its log; rows that were answered are kept",
            )

    def wait(self, url: str, deadline_s: float) -> None:
        """Return once the server says that it is well."""
        deadline = time.monotonic() + deadline_s
        while True:
            if self.error is not None:
                raise self.error
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(url, timeout=2.0, trust_env=False).is_success:
                    self.up = True
                    return
            if time.monotonic() > deadline:
                fix = "raise resources.servers.start_deadline_s, or see its log"
                raise TransientError(
                    f"the server was not up within {deadline_s:g} s",
                    where=f"its log is {self.log_path}",
                    fix=fix,
                )
            time.sleep(LOOK_S)
