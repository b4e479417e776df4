"""Keys of `resources` before it had sections: refused with their new path, translated in what an
older version recorded.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from deepspec.artifacts.lineage import find_run
from deepspec.config.old_keys import RENAMED, moved_keys, translated
from deepspec.config.recipes import load_run
from deepspec.config.resources import ResourcesConfig
from deepspec.errors import ConfigError

# What a version without sections recorded of a run with settings of its own.
RECORDED = {
    "device": "cpu",
    "runner": "workers",
    "endpoints": ["http://127.0.0.1:8000/v1"],
    "served_model": "other",
    "retries": 7,
    "stages": {"train": {"retries": 1, "retry_delay_s": 3.0, "deadline_minutes": 5.0}},
    "fidelity": {"min_cosine": 0.5},
    "rolling_gb": 12.0,
    "writes": "buffered",
}
# What versions without sections called by the names that the fields of the sections have now.
KEPT_NAMES = """
    lanes encode_threads read_threads evaluate_threads speed_curve ray_address workers
    shards_per_task group_minutes stop_s endpoints dialect api_key_env api_key_secret
    request_timeout_s request_tries row_runs max_refused lost_s progress_s token_ids
    deadline_minutes stages max_failed stall_minutes scratch min_free_gb space_poll_s batch_tokens
    answer_rows recompute zero_stage offload write_buffer_mb prefetch_mb preflight uploads fidelity
    compile source rolling_gb rolling_gpus render_processes
"""


def fields_of(model: type[BaseModel], path: str = "") -> dict[str, Any]:
    found = {}
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel) and name != "fidelity":
            found |= fields_of(section, f"{path}{name}.")
        else:
            found[path + name] = field
    return found


def test_every_old_key_leads_to_a_field_of_its_own():
    moved = moved_keys(dict.fromkeys([*KEPT_NAMES.split(), *RENAMED], 0), ResourcesConfig)
    assert len(set(moved.values())) == len(moved) == 57
    assert set(moved.values()) <= set(fields_of(ResourcesConfig))


@pytest.mark.parametrize(
    ("override", "old", "new"),
    [
        (
            "resources.endpoints=[http://127.0.0.1:8000/v1]",
            "resources.endpoints",
            "resources.servers.endpoints",
        ),
        ("resources.runner=ray", "resources.runner", "resources.runner.kind"),
        ("resources.retries=5", "resources.retries", "resources.retries.times"),
        ("resources.stages.train.retries=10", "resources.stages", "resources.retries.stages"),
        ("resources.fidelity.min_cosine=0.9", "resources.fidelity", "resources.checks.fidelity"),
    ],
)
def test_an_old_key_is_answered_with_its_new_path(override: str, old: str, new: str):
    with pytest.raises(ConfigError, match=f"{old} is now {new}\n"):
        load_run("demo", [override])


def test_a_key_that_is_gone_is_answered_in_one_line():
    with pytest.raises(ConfigError, match="writes no longer exists: shards are written"):
        load_run("demo", ["resources.writes=direct"])


def test_old_keys_of_a_run_file_are_all_named_at_once(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"recipe": "demo", "resources": {"lanes": 2, "retries": 3}}))
    with pytest.raises(ConfigError) as error:
        load_run(str(path))
    assert "resources.lanes is now resources.devices.lanes" in error.value.what
    assert "resources.retries is now resources.retries.times" in error.value.what


def test_what_an_older_version_recorded_is_translated():
    found = ResourcesConfig.model_validate(translated(RECORDED, ResourcesConfig))
    assert found.devices.type == "cpu" and found.runner.kind == "workers"
    assert found.servers.endpoints == ("http://127.0.0.1:8000/v1",)
    assert found.servers.model_name == "other" and found.retries.times == 7
    assert found.retries.limits("train") == (1, 3.0, 300.0)
    assert found.checks.fidelity.min_cosine == 0.5 and found.training.rolling_gb == 12


def test_what_this_version_records_is_left_as_it_is():
    recorded = ResourcesConfig.model_validate(translated(RECORDED, ResourcesConfig)).model_dump(
        mode="json"
    )
    assert translated(recorded, ResourcesConfig) == recorded


def test_the_run_of_an_older_artifact_is_read(demo_store: Path, tmp_path: Path):
    shutil.copytree(demo_store, tmp_path / "store")
    (path,) = (tmp_path / "store").glob("demo/*/artifact.json")
    info = json.loads(path.read_text())
    info["run"]["resources"] = RECORDED | {"min_free_gb": 0.25}
    path.write_text(json.dumps(info))
    assert find_run(str(path.parent)).resources.storage.min_free_gb == 0.25
