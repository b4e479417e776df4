"""The speed of a target against the tokens of a step: looked up, read from a file, measured."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deepspec.errors import DataError, OutOfMemory
from deepspec.evaluate import speed_curve
from deepspec.evaluate.speed_curve import SpeedCurve, profile, read_curve
from deepspec.target.model import TargetCache
from tests.target.test_model import make_target


def test_seconds_are_interpolated_between_points_flat_in_front_and_proportional_behind():
    curve = SpeedCurve([2, 4, 8], [10.0, 5.0, 2.5])  # 0.1, 0.2 and 0.4 seconds
    assert curve.seconds([1, 2, 3, 4, 6, 8, 16]) == pytest.approx(
        [0.1, 0.1, 0.15, 0.2, 0.3, 0.4, 0.8]
    )
    assert curve(3) == pytest.approx(1 / 0.15)


def test_a_point_slower_than_a_later_one_was_disturbed():
    curve = SpeedCurve([1, 2, 3, 4], [10.0, 1.0, 8.0, 4.0])
    assert curve([1, 2, 3, 4]) == pytest.approx([10.0, 8.0, 8.0, 4.0])


def test_a_smooth_curve_is_convex_and_below_the_measured_seconds():
    """The stair at 2 goes, as the straight line from 1 to 4 runs under it; the knee at 4 stays."""
    smooth = SpeedCurve([1, 2, 4, 5], [1 / 1.0, 1 / 1.5, 1 / 1.6, 1 / 3.0]).smooth()
    assert smooth.tokens.tolist() == [1, 4, 5]
    assert smooth.seconds([1, 2, 4, 5]) == pytest.approx([1.0, 1.2, 1.6, 3.0])
    rng = np.random.default_rng(0)
    for _ in range(50):
        tokens = np.cumsum(rng.integers(1, 9, 12))
        rough = SpeedCurve(tokens, 1 / (1 + np.cumsum(rng.exponential(1.0, 12))))
        seconds = rough.smooth().seconds(np.arange(tokens[0], tokens[-1] + 1))
        assert (seconds <= rough.seconds(np.arange(tokens[0], tokens[-1] + 1)) + 1e-12).all()
        assert (np.diff(seconds, n=2) > -1e-9).all()
        assert rough.smooth().smooth().tokens.tolist() == rough.smooth().tokens.tolist()


@pytest.mark.parametrize(
    ("tokens", "speeds", "said"),
    [
        ([], [], "no curve"),
        ([1, 2], [1.0], "no curve"),
        ([2, 1], [1.0, 1.0], "ascend"),
        ([0, 1], [1.0, 1.0], "ascend"),
        ([1, 2], [1.0, 0.0], "above 0"),
        ([1, 2], [1.0, float("inf")], "above 0"),
    ],
)
def test_what_is_no_curve_is_refused(tokens: list[int], speeds: list[float], said: str):
    with pytest.raises(DataError, match=said):
        SpeedCurve(tokens, speeds)


def test_a_curve_goes_through_a_file(tmp_path: Path):
    points = SpeedCurve([1, 8], [50.0, 40.0]).points().model_dump()
    assert points == {"tokens": [1, 8], "steps_per_second": [50.0, 40.0]}
    (tmp_path / "curve.json").write_text(json.dumps(points))
    assert read_curve(tmp_path / "curve.json")(8) == pytest.approx(40.0)


@pytest.mark.parametrize(
    "text", ["no json", "[]", '{"tokens": [1]}', '{"tokens": ["x"], "steps_per_second": [1.0]}']
)
def test_a_file_that_holds_no_curve_is_refused(text: str, tmp_path: Path):
    (tmp_path / "curve.json").write_text(text)
    with pytest.raises(DataError, match="no speed curve"):
        read_curve(tmp_path / "curve.json")
    with pytest.raises(DataError, match="cannot be read"):
        read_curve(tmp_path / "missing.json")


def test_a_profile_measures_verification_steps_of_whole_requests(monkeypatch: pytest.MonkeyPatch):
    target = make_target()
    shapes, before, forward = [], [], target.forward

    def seen(input_ids: torch.Tensor, cache: TargetCache) -> object:
        shapes.append(tuple(input_ids.shape))
        before.append(set(cache.lengths))
        return forward(input_ids, cache)

    monkeypatch.setattr(target, "forward", seen)
    for name, value in {"TOKENS": (1, 4, 5, 8), "CONTEXT_TOKENS": 10, "ROUNDS": 2}.items():
        monkeypatch.setattr(speed_curve, name, value)
    curve = profile(target, block_size=3)
    # Five tokens are two requests of at most four, which makes six.
    assert {1, 8} <= set(curve.tokens.tolist()) <= {1, 4, 6, 8}  # what is left after smoothing
    sizes = [(1, 1), (1, 4), (2, 3), (2, 4)]
    assert shapes[:8:2] == [(1, 10), (1, 10), (2, 10), (2, 10)]
    assert shapes[1:8:2] == sizes, "each once as a warm-up"
    assert shapes[8:] == sizes * 2
    assert before == [{0}, {10}] * 4 + [{10}] * 8
    assert (curve.steps_per_second > 0).all()


@pytest.mark.parametrize("fails_in", ["context", "step"])
def test_a_curve_ends_before_the_size_that_does_not_fit_into_memory(
    fails_in: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    target, most = make_target(), {"context": 15, "step": 4}[fails_in]
    forward = target.forward

    def limited(input_ids: torch.Tensor, cache: TargetCache) -> object:
        if (fails_in == "context") == (cache.lengths[0] == 0) and input_ids.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return forward(input_ids, cache)

    monkeypatch.setattr(target, "forward", limited)
    for name, value in {"TOKENS": (1, 4, 5, 8), "CONTEXT_TOKENS": 10, "ROUNDS": 2}.items():
        monkeypatch.setattr(speed_curve, name, value)
    curve = profile(target, block_size=3)
    assert max(curve.tokens) <= 4
    assert caplog.text.count("a verification of 6 tokens") == 1
    most = 0
    with pytest.raises(OutOfMemory, match=r"a verification of 1 tokens.*Tried to allocate 2 GiB"):
        profile(target, block_size=3)
