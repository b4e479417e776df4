"""The executor of one machine: a lane is a GPU (or a share of the CPU), its work a guarded child
process.
"""

from __future__ import annotations

import functools
from contextlib import closing
from pathlib import Path

from prefect import get_run_logger
from prefect.blocks.system import Secret

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.run import Run
from deepspec.artifacts.side_files import folder_beside
from deepspec.config.run import RunConfig
from deepspec.errors import ConfigError
from deepspec.process.launch import run_child
from deepspec.process.machine import visible_gpus
from flows.child_log import ChildLog
from flows.shard_scheduler import Lane
from flows.stage_run import StageRun


class LocalExecutor:
    """Children of this process: one per visible GPU, each pinned to it, or as many as
    `resources.devices.lanes` says.
    """

    def __init__(self, run: StageRun) -> None:
        settings = run.config.resources.devices
        devices = visible_gpus() if settings.type != "cpu" and run.sharded else []
        count = (settings.lanes or max(1, len(devices))) if run.sharded else 1
        names = [f"GPU {device}" for device in devices] or ["lane"]
        self.lanes = [
            Lane(
                f"{names[number % len(names)]} #{number}",
                devices[number % len(devices)] if devices else None,
            )
            for number in range(count)
        ]
        self.run, self.secrets = run, api_key(run.config) if run.stage == "answers" else {}

    def work(self, lane: Lane, name: str, shards: list[int] | None) -> None:
        run, path = self.run, log_path(Run(self.run.config).artifact(self.run.stage), name)
        get_run_logger().info("%s: started, full log in %s", name, path)
        command = run.request.command(run.stage, shards)
        on_event = functools.partial(run.on_event, lane=lane.name)
        with closing(ChildLog(path)) as forward:
            run_child(
                command,
                on_event=on_event,
                on_line=forward,
                env=self.environment(lane),
                log_path=path,
                timeout_s=run.limits.deadline_s,
            )

    def environment(self, lane: Lane) -> dict[str, str]:
        """What pins a child to its lane's GPU, makes it tell what it does, and gives it the
        servers' key.
        """
        pinned = {} if lane.device is None else {"CUDA_VISIBLE_DEVICES": lane.device}
        return {"DEEPSPEC_EVENTS": "1", **self.secrets, **pinned}


def log_path(artifact: Artifact, name: str) -> Path:
    """Where all that a group's child says is kept, on the machine that it runs on."""
    return folder_beside(artifact, "logs") / f"{name[:80].replace(' ', '-')}.log"


def api_key(config: RunConfig) -> dict[str, str]:
    """The variable that the answers stage reads the servers' key from, if a Prefect block holds it.

    Raises:
        ConfigError: there is no such block.
    """
    settings = config.resources.servers
    if settings.api_key_secret is None:
        return {}
    try:
        secret = Secret.load(settings.api_key_secret)
    except ValueError:
        where, fix = (
            f"resources.servers.api_key_secret {settings.api_key_secret}",
            "make it in the UI under Blocks, or correct the name",
        )
        raise ConfigError(
            "there is no Secret block of this name on the Prefect server", where=where, fix=fix
        ) from None
    return {settings.api_key_env: str(secret.get())}
