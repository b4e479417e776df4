"""The executor of one machine: a lane is a GPU (or a share of the CPU), its work a supervised child
process.
"""

import functools
from contextlib import closing
from pathlib import Path

from prefect import get_run_logger
from prefect.blocks.system import Secret

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.side_files import folder_beside
from deepspec.config.run import RunConfig
from deepspec.errors import ConfigError
from deepspec.process.launch import run_child
from deepspec.process.machine import group_gpus, visible_gpus
from flows.child_log import ChildLog
from flows.shard_scheduler import Lane
from flows.stage_run import StageRun


class LocalExecutor:
    """Children of this process: one for each visible GPU (or group of `gpus_per_lane`), pinned to
    it, or as many as `resources.devices.lanes` sets.
    """

    def __init__(self, stage_run: StageRun) -> None:
        self.stage_run = stage_run
        resources = stage_run.run.config.resources
        sharded = stage_run.sharded
        devices = resources.devices
        gpus = visible_gpus() if devices.type != "cpu" and sharded else []
        gpus = group_gpus(gpus, devices.gpus_per_lane)
        count = (devices.lanes or max(1, len(gpus))) if sharded else 1
        self.lanes = [_lane(number, gpus) for number in range(count)]
        self.secrets = server_key(stage_run.run.config, stage_run.stage)

    def work(self, lane: Lane, name: str, shards: list[int] | None) -> None:
        """As `Executor` has it."""
        stage_run = self.stage_run
        path = log_path(stage_run.artifact, name)
        get_run_logger().info("%s: started, full log in %s", name, path)
        with closing(ChildLog(path)) as child_log:
            run_child(
                stage_run.request.command(stage_run.stage, shards),
                on_event=functools.partial(stage_run.on_event, lane=lane.name),
                on_line=child_log,
                env=self.environment(lane),
                log_path=path,
                timeout_s=stage_run.limits.deadline_s,
            )

    def environment(self, lane: Lane) -> dict[str, str]:
        """What pins a child to its lane's GPU, makes it report events, and gives it the servers'
        key.
        """
        pinned = {} if lane.device is None else {"CUDA_VISIBLE_DEVICES": lane.device}
        return {"DEEPSPEC_EVENTS": "1", **self.secrets, **pinned}


def _lane(number: int, gpus: list[str]) -> Lane:
    if not gpus:
        return Lane(f"lane #{number}")
    gpu = gpus[number % len(gpus)]
    return Lane(f"GPU {gpu} #{number}", gpu)


def log_path(artifact: Artifact, name: str) -> Path:
    """The file for all output of a group's child, on the machine that it runs on."""
    return folder_beside(artifact, "logs") / f"{name[:80].replace(' ', '-')}.log"


def server_key(config: RunConfig, stage: str) -> dict[str, str]:
    """The variable that a stage which sends requests reads the servers' key from, if a Prefect
    block holds it.

    Raises:
        ConfigError: there is no such block.
    """
    servers = config.resources.servers
    sends = stage == "answers" or (stage == "evaluate" and config.evaluate.is_served)
    if servers.api_key_secret is None or not sends:
        return {}
    try:
        secret = Secret.load(servers.api_key_secret)
    except ValueError:
        raise ConfigError(
            "there is no Secret block of this name on the Prefect server",
            where=f"resources.servers.api_key_secret {servers.api_key_secret}",
            fix="make it in the UI under Blocks, or correct the name",
        ) from None
    return {servers.api_key_env: str(secret.get())}
