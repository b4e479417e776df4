"""What a training without a cache has children do: `python -m deepspec hidden` for shards to
use up, or for the index alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from itertools import count
from typing import Any

from deepspec.artifacts import gc
from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.run import Run
from deepspec.artifacts.side_files import folder_beside
from deepspec.config.recipes import to_yaml
from deepspec.config.run import RunConfig
from deepspec.errors import DeepSpecError, ShardsFailed
from deepspec.process.events import silent
from deepspec.process.launch import RunRequest, run_child, scope
from deepspec.process.machine import visible_gpus
from deepspec.process.shard_ranges import deal, shard_list

log = logging.getLogger(__name__)

# a process takes seconds to start, and renders a shard of 128 rows in less than one
SHARDS_A_PROCESS = 64


def worker_gpus(config: RunConfig) -> list[str | None]:
    """The GPU of each capture lane: the last of the visible ones; None where a lane takes what
    training computes on.
    """
    resources = config.resources
    gpus = visible_gpus() if resources.devices.type != "cpu" else []
    return (
        list(gpus[-resources.training.rolling_gpus :])
        if gpus and resources.training.rolling_gpus
        else [None]
    )


class CaptureWorker:
    """Captures groups of shards, one after the other, on one GPU."""

    def __init__(self, run: Run, artifact: Artifact, gpu: str | None, *, number: int) -> None:
        config = run.config
        self.config, self.artifact = config, artifact
        self.env = {"DEEPSPEC_EVENTS": "1"} | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
        self.request, self.log_path = (
            save_run_file(run, artifact),
            folder_beside(artifact, "logs") / f"rolling-{number}.log",
        )

    def capture(
        self,
        missing: Callable[[], Sequence[int]],
        on_event: Callable[[dict[str, Any]], None],
        stop: threading.Event,
    ) -> None:
        """Capture what is `missing`, until nothing is.

        Raises:
            DeepSpecError: the child's own error, when it was tried `resources.retries.times` times more
                or trying is no use.
        """
        resources = self.config.resources
        for attempt in count(1):
            shards = missing()
            try:
                return run_child(
                    [*self.request.command("hidden", shards), "--purpose", "rolling"],
                    on_event=on_event,
                    on_line=_warnings,
                    env=self.env,
                    log_path=self.log_path,
                )
            except DeepSpecError as error:
                gc.remove_abandoned(self.artifact.store)
                if (
                    stop.is_set()
                    or attempt > resources.retries.times
                    or not _worth_another_try(error)
                ):
                    raise
                log.warning(
                    "stage=hidden shards=%s failed, and are tried again (%d): %s",
                    shard_list(shards),
                    attempt,
                    error.what,
                )
            stop.wait(resources.retries.delay_s * 2 ** (attempt - 1))


def save_run_file(run: Run, artifact: Artifact) -> RunRequest:
    """The run as a file of its own, for children: how its options were given is not known here."""
    config = run.config
    path = folder_beside(artifact, "logs") / f"run-{run.artifact('train').key.fingerprint}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml(config), encoding="utf-8")
    return RunRequest(str(path))


def render_in_children(run: Run, artifact: Artifact, shards: Sequence[int]) -> None:
    """Have as many processes as are worth their start write the planned index of these shards;
    few shards are left to the caller.
    """
    config = run.config
    resources = config.resources
    processes = min(
        resources.training.render_processes or os.cpu_count() or 1, len(shards) // SHARDS_A_PROCESS
    )
    if processes < 2:
        return
    request, env = (
        save_run_file(run, artifact),
        {"DEEPSPEC_EVENTS": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    log.info("stage=hidden rendering %d shards of answers in %d processes", len(shards), processes)

    def render(group: Sequence[int]) -> None:
        run_child(
            [*request.command("hidden", group), "--purpose", "index"],
            on_event=silent,
            on_line=_warnings,
            env=env,
        )

    with ThreadPoolExecutor(processes) as pool, scope():
        # Each thread in a context of its own, in which it finds the scope that ends its child.
        for done in [
            pool.submit(copy_context().run, render, group)
            for group in deal(shards, -(-len(shards) // processes))
        ]:
            done.result()


def _worth_another_try(error: DeepSpecError) -> bool:
    return bool(error.retryable) if isinstance(error, ShardsFailed) else error.transient


def _warnings(line: str) -> None:
    with contextlib.suppress(IndexError):
        if " WARNING " in line or " ERROR " in line:
            log.warning("capture: %s", line)
