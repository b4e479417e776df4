"""Capture for a rolling training: `python -m deepspec hidden --rolling` in guarded children, tried again where that may help."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from deepspec import gc
from deepspec.artifact import Artifact
from deepspec.aside import folder_beside
from deepspec.config import RunConfig
from deepspec.errors import DeepSpecError, ShardsFailed
from deepspec.gpus import visible_gpus
from deepspec.launch import Request, run_child, shard_list
from deepspec.recipe import to_yaml

log = logging.getLogger(__name__)


def lane_gpus(config: RunConfig) -> list[str | None]:
    """The GPU of each capture lane: the last of the visible ones; None where a lane takes what training computes on."""
    resources = config.resources
    gpus = visible_gpus() if resources.device != "cpu" else []
    return list(gpus[-resources.rolling_gpus :]) if gpus and resources.rolling_gpus else [None]


class Lane:
    """Captures groups of shards, one after the other, on one GPU."""

    def __init__(self, config: RunConfig, artifact: Artifact, gpu: str | None, *, number: int) -> None:
        self.config, self.artifact = config, artifact
        self.env = {"DEEPSPEC_EVENTS": "1"} | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
        logs = folder_beside(artifact, "logs")
        logs.mkdir(parents=True, exist_ok=True)
        self.run_file, self.log_path = logs / f"rolling-{number}.yaml", logs / f"rolling-{number}.log"
        self.run_file.write_text(to_yaml(config), encoding="utf-8")

    def capture(self, missing: Callable[[], Sequence[int]], on_event: Callable[[dict[str, Any]], None], stop: threading.Event) -> None:
        """Capture what is `missing`, until nothing is.

        Raises:
            DeepSpecError: the child's own error, when it was tried `resources.retries` times more or trying is no use.
        """
        resources, request = self.config.resources, Request(str(self.run_file))
        for attempt in count(1):
            shards = missing()
            try:
                return run_child(
                    [*request.command("hidden", shards), "--rolling"],
                    on_event=on_event,
                    on_line=_warnings,
                    env=self.env,
                    log_path=self.log_path,
                )
            except DeepSpecError as error:
                gc.remove_abandoned(self.artifact.store)
                if stop.is_set() or attempt > resources.retries or not _worth_another_try(error):
                    raise
                log.warning("stage=hidden shards=%s failed, and are tried again (%d): %s", shard_list(shards), attempt, error.what)
            stop.wait(resources.retry_delay_s * 2 ** (attempt - 1))


def _worth_another_try(error: DeepSpecError) -> bool:
    return bool(error.retryable) if isinstance(error, ShardsFailed) else error.transient


def _warnings(line: str) -> None:
    with contextlib.suppress(IndexError):
        if " WARNING " in line or " ERROR " in line:
            log.warning("capture: %s", line)
