"""A plan from facts small enough to work out by hand."""

import json
from pathlib import Path

import pytest

from deepspec.config.run import RunConfig
from deepspec.plan.forecast import compute_plan, puts_per_file
from deepspec.plan.parts import Facts, Number, Plan, SampleSize, Shape, Speed, TokenCounts, Workload
from deepspec.plan.view import print_plan
from deepspec.storage.s3_client import PART_BYTES
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
    free_bytes=None,
    missing=1.0,
    train_hours=None,
)


def config_of(*overrides: str) -> RunConfig:
    first = ("prompts.held_out=0", "train.max_steps=null", "train.epochs=4")
    return tiny_run(Path("/nowhere"), *first, *overrides)


def plan_of(facts: Facts = FACTS, *overrides: str) -> Plan:
    return compute_plan(config_of(*overrides), facts)


def test_tokens_and_what_max_length_cuts():
    part = plan_of().tokens
    assert (part.supervised, part.cut_samples) == (0.5, 0.5)
    assert part.cut_tokens == 40 / 240
    assert (part.per_sample.p50, part.per_sample.max) == (120, 120)


def test_hours_are_tokens_over_the_speed_of_all_lanes():
    assert plan_of().capture.hours == pytest.approx(1000 / 3600)
    assert plan_of(FACTS._replace(lanes=4)).capture.hours == pytest.approx(250 / 3600)


def test_online_training_captures_in_every_pass():
    plan = plan_of(FACTS._replace(train_hours=2.0))
    assert plan.training.passes == 4
    assert plan.sources.option("cache").hours == pytest.approx(2 + 1000 / 3600)
    assert plan.sources.option("online").hours == pytest.approx(2 + 4 * 1000 / 3600)


def test_what_must_fit_is_what_the_chosen_source_puts_there():
    size = plan_of().size
    for source, needed in (("cache", size.missing_bytes), ("online", size.frozen_bytes)):
        found = plan_of(FACTS, f"resources.training.source={source}")
        assert (found.sources.chosen, found.fit.needed_bytes) == (source, needed)


def test_only_what_is_missing_is_still_captured():
    part = plan_of(FACTS._replace(train_hours=2.0, missing=0.25))
    assert part.capture.hours_left == pytest.approx(250 / 3600)
    assert part.sources.option("cache").hours == pytest.approx(2 + 250 / 3600)
    assert part.sources.option("online").hours == pytest.approx(2 + 4 * 1000 / 3600)


def test_reading_keeps_up_with_training():
    plan = plan_of(FACTS._replace(train_hours=2.0))
    assert plan.training.read_bytes_per_s == pytest.approx(4 * plan.size.num_bytes / 7200)


def test_training_hours_come_from_flops_at_the_measured_speed():
    """Per sample: 4 anchors x 7 slots; 6 x (1000 parameters x (100 + 28) + 512 x 32 x 28); 100
    samples, 4 passes, 1e6 a second.
    """
    seconds = 4 * 100 * 6 * (1000 * 128 + 512 * 32 * 28) / 1e6
    assert plan_of().training.hours == pytest.approx(seconds / 3600)


def test_an_anchor_that_predicts_nothing_is_computed_and_not_scored():
    """Per sample: 4 blocks of 8 inputs and 7 slots."""
    seconds = 4 * 100 * 6 * (1000 * (100 + 32) + 512 * 32 * 28) / 1e6
    found = plan_of(FACTS, "draft.layout=anchor_is_context").training.hours
    assert found == pytest.approx(seconds / 3600)


def test_steps_end_training_before_the_epochs_do():
    """6 steps of 8 samples over 100 are about half a pass."""
    passes = plan_of(FACTS, "train.max_steps=6").training.passes
    assert (passes, passes.origin) == (0.48, "train.max_steps")


def test_held_out_samples_are_captured_but_not_read():
    part = plan_of(FACTS._replace(train_hours=1.0), "prompts.held_out=0.5")
    assert part.training.read_bytes_per_s == pytest.approx(4 * part.size.num_bytes / 2 / 3600)
    assert part.size.gets_per_pass == 50


def test_only_what_is_missing_must_fit():
    whole = plan_of().size
    assert whole.missing_bytes == whole.num_bytes + whole.frozen_bytes
    half = plan_of(FACTS._replace(missing=0.5)).size
    assert half.missing_bytes == half.num_bytes / 2 + half.frozen_bytes
    assert plan_of(FACTS._replace(missing=0.0)).size.missing_bytes == 0


def test_an_unknown_number_of_prompts_is_said_and_nothing_is_refused():
    plan = plan_of(FACTS._replace(work=WORK._replace(prompts=None), free_bytes=0.0))
    assert plan.fit is None
    assert plan.to_json()["fits"] is None
    assert any("1,000 prompts" in note for note in plan.notes)


def test_a_store_slower_than_the_capture_is_pointed_out():
    assert any("will wait" in note for note in plan_of(FACTS._replace(store_bytes_per_s=1.0)).notes)


def test_the_json_holds_every_number_with_its_origin():
    found = json.loads(json.dumps(plan_of(FACTS._replace(free_bytes=1.0)).to_json()))
    assert found["fits"] is False
    assert found["tokens"]["tokens"] == {"value": 10_000, "origin": "sample of 2"}
    assert set(found["size"]["bytes_by_codec"]) >= {"raw", "lossless", "int8", "fp8, last int8"}


def test_the_table_fits_a_terminal_and_says_the_verdict(capsys):
    print_plan(plan_of(FACTS._replace(free_bytes=1.0)), is_terminal=False)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 100
    assert "it does NOT fit" in said
    print_plan(plan_of(), is_terminal=True)
    assert "no known limit" in capsys.readouterr().out


def test_requests_by_hand():
    """Three parts: these, create and complete. Small shards take three requests each (data, index
    rows, record); once: one small file and five more.
    """
    assert puts_per_file(1000) == 1
    assert puts_per_file(2 * PART_BYTES + 1) == 3 + 2
    assert plan_of(FACTS, "prompts.shard_rows=10").size.puts == 10 * 3 + 1 + 5


def notes_of(num_prompts: int, shard_rows: int) -> str:
    work = WORK._replace(
        prompts=Number(num_prompts, "exact"), counts=WORK.counts.scaled(num_prompts / 100)
    )
    facts = FACTS._replace(work=work, shape=Shape(5, 2560, 151_936))
    return " ".join(plan_of(facts, f"prompts.shard_rows={shard_rows}", "hidden.codec=raw").notes)


def test_shards_out_of_proportion_are_pointed_out():
    """A prompt takes 2.8 MB."""
    assert "prompts.shard_rows" not in notes_of(10_000, 512)
    assert "too much for one upload" in notes_of(10_000, 2048)
    assert "set prompts.shard_rows to about 704" in notes_of(10_000, 2048)
    assert "takes only" in notes_of(10_000, 8)
    # small shards of a small cache hurt nobody
    assert "prompts.shard_rows" not in notes_of(100, 8)
