"""Keys of `resources` before it had sections: where each one is now.

A run as a user writes it must use the new keys (`ResourcesConfig` answers an old one with its new
path); the run recorded in an artifact of an older version is translated.
"""

from collections.abc import Mapping
from typing import Any

NEW_PATHS = {
    "device": "devices.type",
    "lanes": "devices.lanes",
    "encode_threads": "devices.encode_threads",
    "read_threads": "devices.read_threads",
    "evaluate_threads": "devices.evaluate_threads",
    "speed_curve": "devices.speed_curve",
    "runner": "runner.kind",
    "ray_address": "runner.ray_address",
    "workers": "runner.workers",
    "shards_per_task": "runner.shards_per_task",
    "group_minutes": "runner.group_minutes",
    "stop_s": "runner.stop_s",
    "endpoints": "servers.endpoints",
    "dialect": "servers.dialect",
    "serve": "servers.start",
    "serve_command": "servers.start_command",
    "serve_deadline_s": "servers.start_deadline_s",
    "served_model": "servers.model_name",
    "api_key_env": "servers.api_key_env",
    "api_key_secret": "servers.api_key_secret",
    "endpoint_requests": "servers.requests",
    "request_timeout_s": "servers.request_timeout_s",
    "request_tries": "servers.request_tries",
    "row_runs": "servers.row_runs",
    "max_refused": "servers.max_refused",
    "lost_s": "servers.lost_s",
    "progress_s": "servers.progress_s",
    "token_ids": "servers.token_ids",
    "retries": "retries.times",
    "retry_delay_s": "retries.delay_s",
    "deadline_minutes": "retries.deadline_minutes",
    "stages": "retries.stages",
    "max_failed": "retries.max_failed",
    "stall_minutes": "retries.stall_minutes",
    "scratch": "storage.scratch",
    "min_free_gb": "storage.min_free_gb",
    "space_poll_s": "storage.space_poll_s",
    "cache_gb": "storage.copies_gb",
    "batch_tokens": "memory.batch_tokens",
    "answer_rows": "memory.answer_rows",
    "recompute": "memory.recompute",
    "zero_stage": "memory.zero_stage",
    "offload": "memory.offload",
    "write_buffer_mb": "memory.write_buffer_mb",
    "prefetch_mb": "memory.prefetch_mb",
    "check_space": "checks.space",
    "preflight": "checks.preflight",
    "check_every": "checks.recapture_every",
    "uploads": "checks.uploads",
    "check_reads": "checks.reads",
    "fidelity": "checks.fidelity",
    "train_ranks": "training.ranks",
    "compile": "training.compile",
    "source": "training.source",
    "rolling_gb": "training.rolling_gb",
    "rolling_gpus": "training.rolling_gpus",
    "render_processes": "training.render_processes",
}
REMOVED = {"writes": "shards are written through the page cache"}
IN_STAGES = {"retries": "times", "retry_delay_s": "delay_s"}  # of `retries.stages.<stage>`
SECTIONS = ("runner", "retries")  # old keys that are sections now; their old values were scalars


def moved_keys(resources: Mapping[str, Any]) -> dict[str, str]:
    """The old keys among these of `resources`, each with its new path."""
    return {
        key: NEW_PATHS[key]
        for key, value in resources.items()
        if key in NEW_PATHS and (key not in SECTIONS or isinstance(value, str | int))
    }


def translated(resources: Mapping[str, Any]) -> dict[str, Any]:
    """`resources` as an older version recorded it, with its settings under the new keys."""
    moved = moved_keys(resources)
    found: dict[str, Any] = {
        key: dict(value)
        for key, value in resources.items()
        if key not in moved and key not in REMOVED
    }
    for old, new in moved.items():
        section, _, field = new.partition(".")
        value = resources[old]
        if old == "stages":
            value = {
                stage: {IN_STAGES.get(key, key): limit for key, limit in limits.items()}
                for stage, limits in value.items()
            }
        found.setdefault(section, {})[field] = value
    return found
