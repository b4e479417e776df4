"""A plan from facts small enough to work out by hand."""

import json
from pathlib import Path

import pytest

from deepspec.plan.arithmetic import Fit, Number, Shape, TokenCounts
from deepspec.plan.forecast import compute_plan
from deepspec.plan.parts import Facts, Plan, SampleSize, Speed, Workload
from deepspec.plan.view import print_plan, render
from tests.conftest import tiny_run

# 100 prompts of 100 tokens, half of them supervised; a lane does 10 tokens/s, so capture takes 1000
# s.
SIZES = (SampleSize(80, 40, 42, 80), SampleSize(120, 60, 62, 160))
WORK = Workload(
    Number(100, "exact"),
    TokenCounts(100, 10_000, 5_000, 5_200),
    "sample of 2",
    "all committed",
    True,
    0.1,
    SIZES,
)
FACTS = Facts(
    work=WORK,
    shape=Shape(3, 32, 512),
    draft_parameters=1000,
    speed=Speed(10.0, 1e6, "cpu", 64),
    lanes=1,
    store_bytes_per_s=1e9,
    missing=1.0,
    train_hours=None,
)


def plan_of(facts: Facts = FACTS, *overrides: str, free: float | None = None) -> Plan:
    config = tiny_run(
        Path("/nowhere"), "prompts.held_out=0", "train.max_steps=null", "train.epochs=4", *overrides
    )
    return compute_plan(config, facts, room=lambda needed: Fit(needed, free, 0.0))


def test_tokens_and_what_max_length_cuts():
    part = plan_of().tokens
    assert (part.supervised.value, part.cut_samples.value) == (0.5, 0.5)
    assert part.cut_tokens.value == 40 / 240
    assert (part.per_sample.p50, part.per_sample.max) == (120, 120)


def test_hours_are_tokens_over_the_speed_of_all_lanes():
    assert plan_of().capture.hours.value == pytest.approx(1000 / 3600)
    assert plan_of(FACTS._replace(lanes=4)).capture.hours.value == pytest.approx(250 / 3600)


def test_online_training_captures_in_every_pass():
    plan = plan_of(FACTS._replace(train_hours=2.0))
    assert plan.training.passes.value == 4
    assert plan.sources.option("cache").hours == pytest.approx(2 + 1000 / 3600)
    assert plan.sources.option("online").hours == pytest.approx(2 + 4 * 1000 / 3600)


def test_what_must_fit_is_what_the_chosen_source_puts_there():
    size = plan_of().size
    for source, needed in (
        ("cache", size.missing_bytes.value),
        ("online", size.frozen_bytes.value),
    ):
        found = plan_of(FACTS, f"resources.training.source={source}", free=1e9)
        assert (found.sources.chosen, found.fit.needed_bytes) == (source, needed)


def test_only_what_is_missing_is_still_captured():
    part = plan_of(FACTS._replace(train_hours=2.0, missing=0.25))
    assert part.capture.hours_left.value == pytest.approx(250 / 3600)
    assert part.sources.option("cache").hours == pytest.approx(2 + 250 / 3600)
    assert part.sources.option("online").hours == pytest.approx(2 + 4 * 1000 / 3600)


def test_reading_keeps_up_with_training():
    plan = plan_of(FACTS._replace(train_hours=2.0))
    assert plan.training.read_bytes_per_s.value == pytest.approx(
        4 * plan.size.num_bytes.value / 7200
    )


def test_training_hours_come_from_flops_at_the_measured_speed():
    """Per sample: 4 anchors x 7 slots; 6 x (1000 parameters x (100 + 28) + 512 x 32 x 28); 100
    samples, 4 passes, 1e6 a second.
    """
    seconds = 4 * 100 * 6 * (1000 * 128 + 512 * 32 * 28) / 1e6
    assert plan_of().training.hours.value == pytest.approx(seconds / 3600)


def test_steps_end_training_before_the_epochs_do():
    """6 steps of 8 samples over 100 are about half a pass."""
    assert plan_of(FACTS, "train.max_steps=6").training.passes == Number(0.48, "train.max_steps")


def test_held_out_samples_are_captured_but_not_read():
    part = plan_of(FACTS._replace(train_hours=1.0), "prompts.held_out=0.5")
    assert part.training.read_bytes_per_s.value == pytest.approx(
        4 * part.size.num_bytes.value / 2 / 3600
    )
    assert part.size.gets_per_pass.value == 50


def test_only_what_is_missing_must_fit():
    whole = plan_of().size
    assert whole.missing_bytes.value == whole.num_bytes.value + whole.frozen_bytes.value
    half = plan_of(FACTS._replace(missing=0.5)).size
    assert half.missing_bytes.value == half.num_bytes.value / 2 + half.frozen_bytes.value
    assert plan_of(FACTS._replace(missing=0.0)).size.missing_bytes.value == 0


def test_an_unknown_number_of_prompts_is_said_and_nothing_is_refused():
    plan = plan_of(FACTS._replace(work=WORK._replace(prompts=None)), free=0.0)
    assert plan.fit is None
    assert plan.to_json()["fits"] is None
    assert any("1,000 prompts" in note for note in plan.notes)


def test_a_store_slower_than_the_capture_is_pointed_out():
    assert any("will wait" in note for note in plan_of(FACTS._replace(store_bytes_per_s=1.0)).notes)


def test_the_json_holds_every_number_with_its_origin():
    found = json.loads(json.dumps(plan_of(FACTS, free=1.0).to_json()))
    assert found["fits"] is False
    assert found["tokens"]["tokens"] == {"value": 10_000, "origin": "sample of 2"}
    assert set(found["size"]["bytes_by_codec"]) >= {"raw", "lossless", "int8", "fp8, last int8"}


def test_the_table_fits_a_terminal_and_says_the_verdict(capsys):
    print_plan(plan_of(FACTS, free=1.0), is_terminal=False)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 100
    assert "it does NOT fit" in said
    assert render(plan_of())
