"""Keys of `resources` before it had sections: where each one is now.

A run as a user writes it must use the new keys (`ResourcesConfig` answers an old one with its new
path); the run recorded in an artifact of an older version is translated.
"""

from collections.abc import Mapping
from typing import Any

from deepspec.config.section import Section, sections_in

# where the key is not the field's name; any other one is found by it
RENAMED = {
    "device": "devices.type",
    "runner": "runner.kind",
    "serve": "servers.start",
    "serve_command": "servers.start_command",
    "serve_deadline_s": "servers.start_deadline_s",
    "served_model": "servers.model_name",
    "endpoint_requests": "servers.requests",
    "retries": "retries.times",
    "retry_delay_s": "retries.delay_s",
    "cache_gb": "storage.copies_gb",
    "check_space": "checks.space",
    "check_every": "checks.recapture_every",
    "check_reads": "checks.reads",
    "train_ranks": "training.ranks",
}
REMOVED = {"writes": "shards are written through the page cache"}
IN_STAGES = {"retries": "times", "retry_delay_s": "delay_s"}  # of `retries.stages.<stage>`
SECTIONS = ("runner", "retries")  # old keys that are sections now; their old values were scalars


def moved_keys(resources: Mapping[str, Any], sections: type[Section]) -> dict[str, str]:
    """The old keys among these of `resources`, each with its new path in one of the sections."""
    paths = {
        name: f"{section}.{name}"
        for section, field in sections.model_fields.items()
        for inner in sections_in(field.annotation)
        for name in inner.model_fields
    } | RENAMED
    return {
        key: paths[key]
        for key, value in resources.items()
        if key in paths and (key not in SECTIONS or isinstance(value, str | int))
    }


def translated(resources: Mapping[str, Any], sections: type[Section]) -> dict[str, Any]:
    """`resources` as an older version recorded it, with its settings under the new keys."""
    moved = moved_keys(resources, sections)
    found = {
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
