"""Curves of a run as pictures: the right numbers in the right places, small, and readable by
anything that reads SVG.
"""

import base64
import re
from xml.etree import ElementTree

from deepspec.figures.curves import Made, throughput, training
from deepspec.figures.drawing import data_url

SVG = "{http://www.w3.org/2000/svg}"


def words(picture: str) -> list[str]:
    return ["".join(text.itertext()) for text in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def heights(picture: str) -> list[float]:
    """Where the first line's points lie, from the top."""
    lines = [
        path.get("d", "")
        for path in ElementTree.fromstring(picture).iter(f"{SVG}path")
        if "var(--c0); stroke-width" in path.get("style", "")
    ]
    return [float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", lines[0])]


def test_throughput_counts_tokens_where_there_are_any_and_shards_otherwise():
    by_tokens = throughput("answers", [Made(second, 10) for second in range(60)], 60)
    assert "answers: tokens per minute" in words(by_tokens) and "600" in words(by_tokens), (
        "60 shards of 10 tokens in a minute"
    )
    by_shards = throughput("prompts", [Made(second, 0) for second in range(60)], 60)
    assert "prompts: shards per minute" in words(by_shards) and "60" in words(by_shards)


def test_a_stage_that_gets_slower_falls():
    slower = [
        *(Made(second / 2, 10) for second in range(120)),
        *(Made(60 + second * 2, 10) for second in range(30)),
    ]
    first, *_, last = heights(throughput("hidden", slower, 120))
    assert last > first, "y grows downwards"


def test_a_long_training_is_a_small_picture_with_its_held_out_acceptance():
    lines = [
        {"step": step, "loss": 5 - step / 40_000, "acceptance_length": 1 + step / 90_000}
        for step in range(10, 100_000, 10)
    ]
    loss, acceptance = training([*lines, {"step": 50_000, "held_out_acceptance_length": 1.4}])
    assert "Loss" in words(loss) and {"Acceptance length", "held out"} <= set(words(acceptance))
    assert len(loss) < 10_000 and len(acceptance) < 10_000
    first, *_, last = heights(loss)
    assert last > first


def test_a_loss_that_is_no_number_is_left_out():
    (loss,) = training(
        [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 1.0}]
    )
    assert len(heights(loss)) == 2
    assert training([{"step": 1, "loss": float("nan")}]) == []


def test_a_picture_is_an_url_that_holds_it():
    (loss,) = training([{"step": 1, "loss": 2.0}])
    kind, _, held = data_url(loss).partition(",")
    assert kind == "data:image/svg+xml;base64" and base64.b64decode(held).decode() == loss
