"""Lanes of one machine: one for each GPU, or as many as are set."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from deepspec.errors import ConfigError
from deepspec.process.machine import visible_gpus
from flows.local_executor import LocalExecutor
from flows.ray_executor import RayExecutor
from tests.flows.test_stage_run import answers_run

pytestmark = pytest.mark.filterwarnings("ignore:Artifact creation outside")


def test_each_lane_pins_its_child_to_one_gpu(run_file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-3,GPU-5")
    assert visible_gpus() == ["GPU-3", "GPU-5"]
    executor = LocalExecutor(answers_run(run_file))
    environments = [executor.environment(lane) for lane in executor.lanes]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in environments] == ["GPU-3", "GPU-5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    in_pairs = LocalExecutor(answers_run(run_file, "resources.devices.gpus_per_lane=2"))
    environments = [in_pairs.environment(lane) for lane in in_pairs.lanes]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in environments] == ["0,1", "2,3"]
    with pytest.raises(ConfigError, match="4 GPUs cannot be dealt to lanes of 3"):
        LocalExecutor(answers_run(run_file, "resources.devices.gpus_per_lane=3"))
    three = ("resources.devices.type=cpu", "resources.devices.lanes=3")
    on_cpu = LocalExecutor(answers_run(run_file, *three))
    assert len(on_cpu.lanes) == 3
    assert "CUDA_VISIBLE_DEVICES" not in on_cpu.environment(on_cpu.lanes[0])


@pytest.mark.parametrize(
    ("overrides", "lanes", "gpus"),
    [
        ((), 4, 1.0),
        (("resources.devices.lanes=8",), 8, 0.5),
        (("resources.devices.gpus_per_lane=2",), 2, 2),
        (("resources.devices.gpus_per_lane=2", "resources.devices.lanes=3"), 3, 2),
    ],
)
def test_lanes_of_a_ray_cluster_ask_for_their_gpus(
    run_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
    lanes: int,
    gpus: float,
):
    """Four GPUs; a third lane of two waits until two are free."""
    cluster = SimpleNamespace(cluster_resources=lambda: {"CPU": 8.0, "GPU": 4.0})
    monkeypatch.setattr("flows.ray_cluster.imported_ray", lambda: cluster)
    executor = RayExecutor(answers_run(run_file, *overrides), SimpleNamespace())
    assert (len(executor.lanes), executor.options) == (lanes, {"num_gpus": gpus})
    with pytest.raises(
        ConfigError, match="4 GPUs of the Ray cluster cannot be dealt to lanes of 3"
    ):
        RayExecutor(answers_run(run_file, "resources.devices.gpus_per_lane=3"), SimpleNamespace())
