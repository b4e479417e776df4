"""A Prefect server, workers and flow runs as processes that a test kills and starts again, as a
site loses its machines.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from deepspec.process.supervisor import kill_marked
from flows.pipeline import FLOWS
from flows.server import free_port
from tests.conftest import REPOSITORY
from tests.flows.conftest import home_with
from tests.processes import marked

POOL = "machines"
# in the environment of everything that runs here, and of whatever that started
MARK = "TEST_MACHINES"
# What a process is, by words of its command line.
SERVER, WORKER, FLOW, LANE = (
    "prefect server",
    "prefect worker",
    "prefect.engine",
    "deepspec answers",
)
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def wait_until(
    true: Callable[[], object], what: str, seconds: float = 120, *, pause_s: float = 0.2
) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, f"{what}: not within {seconds:g} s"
        time.sleep(pause_s)


class Machines:
    def __init__(self, folder: Path, database: Path) -> None:
        self.folder, self.mark, self.port = folder, uuid.uuid4().hex, free_port()
        self.url, home = (
            f"http://127.0.0.1:{self.port}/api",
            home_with(database, folder / "prefect"),
        )
        # One for all: each `httpx.get` reads the certificates anew, 35 ms of CPU. No connection is
        # kept, for servers are killed here.
        self.client = httpx.Client(
            trust_env=False, limits=httpx.Limits(max_keepalive_connections=0)
        )
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")
        }
        self.env = kept | {
            "PREFECT_API_URL": self.url,
            "PREFECT_HOME": str(home),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            "FLAKY_DIR": str(folder),
            MARK: self.mark,
        }

    def start(self, name: str, *words: str) -> None:
        """`prefect WORDS` in a session of its own, so that it is killed alone."""
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [sys.executable, "-m", "prefect", *words]
            subprocess.Popen(
                command,
                env=self.env,
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=accept_interrupts,
            )

    def start_server(self) -> None:
        self.start(
            "server", "server", "start", "--host", "127.0.0.1", "--port", str(self.port), "--no-ui"
        )
        wait_until(self.answers, f"a server, see {self.folder}/server.log")

    def start_worker(self, number: int = 0) -> None:
        self.start(
            f"worker-{number}", "worker", "start", "--pool", POOL, "--name", f"worker-{number}"
        )

    def answers(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self.client.get(f"{self.url}/health", timeout=2).is_success
        return False

    def make_pool(self) -> None:
        template = json.loads(
            (REPOSITORY / "deployments" / "work_pools" / "deepspec-cpu.json").read_text()
        )
        self.post("work_pools/", name=POOL, type="process", base_job_template=template)

    def deploy(self, flow: str) -> str:
        """A deployment of the flow, without a limit: no run waits for the slot of one that
        was killed.
        """
        made = self.post("flows/", name=flow)["id"]
        job = {"stream_output": False, "working_dir": str(REPOSITORY)}
        found = self.post(
            "deployments/",
            name="machines",
            flow_id=made,
            entrypoint=f"flows.pipeline.{FLOWS[flow].fn.__name__}",
            work_pool_name=POOL,
            job_variables=job,
            pull_steps=[],
        )
        return str(found["id"])

    def post(self, path: str, **body: object) -> Any:
        """The server's answer; asked again where it is busy ("database is locked") or was
        killed, as Prefect's own client does.
        """
        return self.ask("POST", path, json=body)

    def ask(self, method: str, path: str, **content: Any) -> Any:
        for _ in range(60):
            with contextlib.suppress(httpx.TransportError):
                answer = self.client.request(method, f"{self.url}/{path}", timeout=60, **content)
                if not answer.is_server_error:
                    return answer.raise_for_status().json()
            time.sleep(1.0)
        raise AssertionError(f"no answer from {path}")

    def begin(self, deployment: str, **parameters: object) -> str:
        """A run, asked for as the UI asks; the key makes it one run, however often it is asked
        for.
        """
        body = {
            "parameters": parameters,
            "state": {"type": "SCHEDULED"},
            "idempotency_key": uuid.uuid4().hex,
        }
        return str(self.post(f"deployments/{deployment}/create_flow_run", **body)["id"])

    def set_state(self, run: str, kind: str, name: str) -> str:
        """What the UI's buttons do: `retry` (SCHEDULED, AwaitingRetry) and `cancel`
        (CANCELLING).
        """
        return str(
            self.post(
                f"flow_runs/{run}/set_state",
                state={"type": kind, "name": name},
                force=kind != "CANCELLING",
            )["status"]
        )

    def state(self, run: str) -> dict[str, Any]:
        return dict(self.ask("GET", f"flow_runs/{run}")["state"])

    def ended(self, run: str, seconds: float = 120) -> str:
        """How the run ended, once it has."""
        wait_until(lambda: self.state(run)["type"] in ENDED, f"the end of the run {run}", seconds)
        return str(self.state(run)["type"])

    def processes(self, words: str = "") -> list[psutil.Process]:
        return marked(MARK, self.mark, words)

    def kill(self, words: str = "") -> int:
        """SIGKILL to all that are called so; returns how many there were."""
        found = self.processes(words)
        for one in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
        psutil.wait_procs(found, timeout=10)
        return len(found)

    def print_logs(self) -> None:
        """Print the last lines of every log, for the reader of a test that failed."""
        for log in sorted(self.folder.glob("*.log")):
            print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-40:], sep="\n")
        with contextlib.suppress(httpx.HTTPError):
            for run in (
                self.client.post(f"{self.url}/flow_runs/filter", json={}).raise_for_status().json()
            ):
                print(
                    "--- run",
                    run["name"],
                    run["state"]["name"],
                    run["state"]["message"] or "",
                    run["parameters"],
                )
            newest = {"limit": 200, "sort": "TIMESTAMP_DESC"}
            for line in reversed(
                self.client.post(f"{self.url}/logs/filter", json=newest).raise_for_status().json()
            ):
                print(line["timestamp"], line["name"], line["message"])


def accept_interrupts() -> None:
    """A worker turns SIGTERM into SIGINT, which what a shell runs in the background ignores,
    and so would its children.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def machines(folder: Path, database: Path) -> Iterator[Machines]:
    made = Machines(folder, database)
    try:
        yield made
    except BaseException:
        made.print_logs()
        raise
    finally:
        made.client.close()
        kill_marked(MARK, made.mark)
