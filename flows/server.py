"""Which Prefect server a run started by hand talks to: the user's own, or a private one for the
length of the run.

Nothing here imports Prefect, which reads its settings when it is imported: they must be in the
environment before. The private server is `prefect server start` under a supervisor; Prefect's own
ephemeral server would outlive a run that is killed.
"""

import atexit
import contextlib
import http.client
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from deepspec.errors import UserError
from deepspec.process.machine import free_port
from deepspec.storage.store import Store

START_S = 180.0  # the first start in a new folder makes the database: 12 s on two idle cores
STOP_S = 5.0
# Long enough for a server that restarts; with Prefect's defaults each request would wait six
# minutes for one that hangs.
PATIENCE = {"PREFECT_API_REQUEST_TIMEOUT": "10", "PREFECT_CLIENT_MAX_RETRIES": "4"}


class PrivateServer:
    """A Prefect server on a free port of this machine, which ends with this process, however that
    ends.
    """

    def __init__(self, home: Path) -> None:
        self.port, self.log_path = free_port(), home / "server.log"
        home.mkdir(parents=True, exist_ok=True)
        os.environ.update(_settings(home, self.port))
        server = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        supervisor = [sys.executable, "-m", "deepspec.process.supervisor", str(STOP_S)]
        command = [*supervisor, sys.executable, "-m", *server, "--no-ui"]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        # Registered before Prefect's own handlers: it runs after they have sent their last events.
        atexit.register(self.stop)

    def wait(self) -> None:
        """Return when the server answers.

        Raises:
            UserError: it ended, or does not answer in time.
        """
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if self._answers():
                return
            time.sleep(0.05)
        lines = self.log_path.read_text(errors="replace").strip().splitlines()[-3:]
        raise UserError(
            f"Prefect's private server did not start: {' / '.join(lines) or 'its log is empty'}",
            where=str(self.log_path),
            fix="read that log, or start a server yourself and set PREFECT_API_URL",
        )

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            contextlib.closing(connection),
        ):
            connection.request("GET", "/api/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        return False

    def stop(self) -> None:
        """End the server, as the end of this process would."""
        if self.process.stdin:
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2 * STOP_S)


def start_private_server(store: Store) -> PrivateServer | None:
    """A private server with its database in the store's folder; None where the user has set up
    Prefect.

    Raises:
        UserError: its folder cannot be written.
    """
    for handler in ("LOGGING_HANDLERS_CONSOLE_LEVEL", "LOGGING_INTERNAL_LEVEL"):
        # the terminal shows bars; the server gets the logs
        os.environ.setdefault(f"PREFECT_{handler}", "CRITICAL")
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    if os.environ.get("PREFECT_API_URL") or _profile_has_server():
        return None
    if store.is_local:
        default = Path(store.root) / ".prefect"
    else:
        default = Path.home() / ".cache" / "deepspec" / "prefect"
    home = Path(os.environ.get("PREFECT_HOME") or default).absolute()
    try:
        return PrivateServer(home)
    except OSError as error:
        raise UserError(
            f"Prefect's folder cannot be written: {error}",
            where=str(home),
            fix="set PREFECT_HOME to another",
        ) from None


def _profile_has_server() -> bool:
    """Whether the Prefect profile in use names a server."""
    home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    try:
        profiles = tomllib.loads((home / "profiles.toml").read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError):
        return False
    active = os.environ.get("PREFECT_PROFILE") or profiles.get("active", "")
    return bool(profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL"))


def _settings(home: Path, port: int) -> dict[str, str]:
    direct = ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1")))
    return {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "NO_PROXY": direct,
        "no_proxy": direct,
    }
