"""What cuts the blocks of a result: decided once, stored in the result, and taken up again."""

import json
from pathlib import Path
from typing import Literal

import pytest

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import ArtifactKey
from deepspec.config.evaluate import BenchmarkConfig, EvaluateConfig
from deepspec.evaluate.calibration import Calibration
from deepspec.evaluate.policies import live_policy, put_calibration
from deepspec.evaluate.scheduler import Scheduled, Threshold
from deepspec.evaluate.speed_curve import SpeedCurve
from deepspec.storage.urls import open_store

CURVE = {"tokens": [1, 64], "steps_per_second": [100.0, 10.0]}
CALIBRATION = Calibration(
    temperatures=[1.0, 2.0],
    rounds=400,
    prompts=8,
    benchmarks=["made"],
    sampling_temperature=0.0,
    grid={},
)


def settings(verify: Literal["full", "threshold", "scheduled"]) -> EvaluateConfig:
    made = BenchmarkConfig(name="made.jsonl")
    return EvaluateConfig(benchmarks=(made,), threshold=0.3, verify=verify)


def curve() -> SpeedCurve:
    return SpeedCurve(**CURVE)


def unneeded() -> SpeedCurve:
    raise AssertionError("the target was profiled")


@pytest.fixture
def result(tmp_path: Path) -> Artifact:
    return Artifact(open_store(str(tmp_path)), ArtifactKey("evaluate", "made", "1a", {}, ()))


@pytest.fixture
def draft(tmp_path: Path) -> Artifact:
    return Artifact(open_store(str(tmp_path)), ArtifactKey("train", "made", "2b", {}, ()))


def test_the_settings_name_the_policy(result: Artifact, draft: Artifact):
    put_calibration(CALIBRATION, result, draft)
    assert live_policy(settings("full"), result, draft, unneeded) is None
    policy = live_policy(settings("threshold"), result, draft, unneeded)
    assert policy == Threshold(0.3, [1.0, 2.0])


def test_a_resumed_result_is_cut_by_the_curve_of_its_first_start(
    result: Artifact, draft: Artifact, caplog: pytest.LogCaptureFixture
):
    for profile in (curve, unneeded):
        policy = live_policy(settings("scheduled"), result, draft, profile)
        assert isinstance(policy, Scheduled)
        assert policy.curve.points() == curve().points() and policy.temperatures is None
    assert caplog.text.count("is not calibrated") == 1


def test_workers_that_start_together_cut_blocks_by_one_curve(result: Artifact, draft: Artifact):
    """Each measured a curve, cut by its own, and left its own in the result: the curve of half of
    the blocks was lost.
    """

    def overtaken() -> SpeedCurve:
        content = json.dumps({"temperatures": None, "curve": CURVE}).encode()
        result.store.write(result.path("policy.json"), content)
        return SpeedCurve([1], [5.0])

    policy = live_policy(settings("scheduled"), result, draft, overtaken)
    assert isinstance(policy, Scheduled) and policy.curve.points() == curve().points()
    assert json.loads(result.store.read(result.path("policy.json")))["curve"] == CURVE
