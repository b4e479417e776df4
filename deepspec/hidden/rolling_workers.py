"""Children of a training without a cache: `python -m deepspec hidden`, which captures or renders.

They capture shards to be used up, or write the expected index alone.
"""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from deepspec.artifacts import gc
from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.run import Run
from deepspec.artifacts.side_files import folder_beside
from deepspec.config.recipes import to_yaml
from deepspec.config.resources import ResourcesConfig
from deepspec.config.retries import RetriesConfig
from deepspec.errors import DeepSpecError
from deepspec.process.events import silent
from deepspec.process.launch import RunRequest, run_child
from deepspec.process.machine import group_gpus, visible_gpus
from deepspec.process.scopes import scope
from deepspec.process.shard_ranges import deal, shard_list

log = logging.getLogger(__name__)

# A process takes seconds to start, and renders a shard of 128 rows in less than one.
SHARDS_A_PROCESS = 64
EVENTS = {"DEEPSPEC_EVENTS": "1"}  # what a child needs in its environment to report them


def worker_gpus(resources: ResourcesConfig) -> list[str | None]:
    """The GPU (or GPUs) of each capture worker: the last of the visible ones.

    None stands for the device that training computes on.

    Raises:
        ConfigError: `rolling_gpus` cannot be dealt to lanes of `gpus_per_lane`.
    """
    num_gpus, devices = resources.training.rolling_gpus, resources.devices
    gpus = visible_gpus() if devices.type != "cpu" else []
    return (
        list(group_gpus(gpus[-num_gpus:], devices.gpus_per_lane)) if gpus and num_gpus else [None]
    )


class CaptureWorker(NamedTuple):
    """Captures groups of shards, one after the other, on one GPU."""

    request: RunRequest
    artifact: Artifact
    gpu: str | None
    retries: RetriesConfig
    log_path: Path

    def capture(
        self,
        missing: Callable[[], Sequence[int]],
        on_event: Callable[[dict[str, Any]], None],
        stop: threading.Event,
    ) -> None:
        """Capture what is `missing`, until nothing is.

        Raises:
            DeepSpecError: the child's own error, when it was tried `resources.retries.times` times
                more, or when another try would not help.
        """
        gpu = {} if self.gpu is None else {"CUDA_VISIBLE_DEVICES": self.gpu}
        for attempt in count(1):
            shards = missing()
            try:
                return run_child(
                    [*self.request.command("hidden", shards), "--purpose", "rolling"],
                    on_event=on_event,
                    on_line=_pass_on_warnings,
                    env=EVENTS | gpu,
                    log_path=self.log_path,
                )
            except DeepSpecError as error:
                gc.remove_abandoned(self.artifact.store)
                if stop.is_set() or attempt > self.retries.times or not error.transient:
                    raise
                message = "stage=hidden shards=%s failed, and are tried again (%d): %s"
                log.warning(message, shard_list(shards), attempt, error.what)
            stop.wait(self.retries.delay_s * 2 ** (attempt - 1))


def make_workers(run: Run) -> list[CaptureWorker]:
    """A worker for each GPU that captures."""
    artifact, request, resources = run.artifact("hidden"), save_run_file(run), run.config.resources
    logs = folder_beside(artifact, "logs")
    return [
        CaptureWorker(request, artifact, gpu, resources.retries, logs / f"rolling-{number}.log")
        for number, gpu in enumerate(worker_gpus(resources))
    ]


def save_run_file(run: Run) -> RunRequest:
    """The run as a file for children, whatever options it was given with."""
    name = f"run-{run.artifact('train').key.fingerprint}.yaml"
    path = folder_beside(run.artifact("hidden"), "logs") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml(run.config), encoding="utf-8")
    return RunRequest(str(path))


def render_in_children(run: Run, shards: Sequence[int]) -> None:
    """Write the expected index of these shards in as many processes as are worth their start.

    Few shards are left to the caller.
    """
    processes = run.config.resources.training.render_processes or os.cpu_count() or 1
    processes = min(processes, len(shards) // SHARDS_A_PROCESS)
    if processes < 2:
        return
    request = save_run_file(run)
    env = EVENTS | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    log.info("stage=hidden rendering %d shards of answers in %d processes", len(shards), processes)

    def render(group: Sequence[int]) -> None:
        command = [*request.command("hidden", group), "--purpose", "index"]
        run_child(command, on_event=silent, on_line=_pass_on_warnings, env=env)

    with ThreadPoolExecutor(processes) as pool, scope():
        # Each thread in a context of its own, in which it finds the scope that ends its child.
        groups = deal(shards, -(-len(shards) // processes))
        for done in [pool.submit(copy_context().run, render, group) for group in groups]:
            done.result()


def _pass_on_warnings(line: str) -> None:
    if " WARNING " in line or " ERROR " in line:
        log.warning("capture: %s", line)
