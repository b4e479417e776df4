"""Benchmarks as evaluated: how many prompts, which turns, what a turn is rendered on, what is
too long.
"""

import json
import shutil
from pathlib import Path

import pytest

from deepspec.artifacts.lineage import lineage_lines
from deepspec.artifacts.run import Run
from deepspec.config.benchmarks import KNOWN
from deepspec.errors import ConfigError
from deepspec.evaluate.prompts import load_benchmarks, make_units, render_turns, too_long
from deepspec.evaluate.results import read_rows
from deepspec.evaluate.stage import run_evaluate
from deepspec.messages import Message
from deepspec.target.chat import load_chat
from deepspec.train.loop import run_train
from tests.conftest import tiny_run, write_jsonl


@pytest.fixture
def mt_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A local data set of mt-bench's shape in the place of the hub's: twelve prompts of two
    turns, ten of them the protocol's.
    """
    (tmp_path / "set").mkdir()
    rows = [
        {"prompt": [f"What is {number} plus 1?", "And what was the question?"]}
        for number in range(12)
    ]
    write_jsonl(tmp_path / "set" / "train.jsonl", rows)
    monkeypatch.setitem(
        KNOWN,
        "mt-bench",
        KNOWN["mt-bench"].model_copy(
            update={"dataset": str(tmp_path / "set"), "num_prompts": 10, "revision": None}
        ),
    )
    return str(tmp_path / "set")


def load(store: Path, **settings: object):
    return load_benchmarks(Run(tiny_run(store, f"evaluate.benchmarks={json.dumps([settings])}")))[0]


def test_a_known_benchmark_takes_its_own_number_of_first_turns_and_a_limit_another(
    mt_bench: str, tmp_path: Path
):
    default = load(tmp_path / "store", name="mt-bench")
    assert (default.name, default.domain, len(default.prompts)) == ("mt-bench", "chat", 10)
    assert all(len(turns) == 1 for turns in default.prompts)
    assert load(tmp_path / "store", name="mt-bench").prompts == default.prompts
    assert len(load(tmp_path / "store", name="mt-bench", limit=3).prompts) == 3
    assert len(load(tmp_path / "store", name="mt-bench", limit=99).prompts) == 12
    both = load(tmp_path / "store", name="mt-bench", turns="all", domain="other")
    assert (both.domain, [turns[:1] for turns in both.prompts]) == ("other", default.prompts)
    assert all(len(turns) == 2 for turns in both.prompts)


def test_a_file_takes_all_its_prompts_and_is_of_no_domain_unless_it_is_said(tmp_path: Path):
    path = str(
        write_jsonl(tmp_path / "mine.jsonl", [{"turns": [f"q {number}"]} for number in range(700)])
    )
    found = load(tmp_path / "store", name=path)
    assert (found.name, found.domain, len(found.prompts)) == ("mine", "other", 700)
    assert load(tmp_path / "store", name=path, domain="code").domain == "code"


def test_the_demos_benchmarks_have_the_domains_of_their_names(store: Path):
    config = tiny_run(store)
    units = make_units(config, load_benchmarks(Run(config)))
    assert {(unit.benchmark, unit.domain) for unit in units} == {
        ("math", "math"),
        ("code", "code"),
        ("chat", "chat"),
    }


def test_two_benchmarks_of_one_name_are_refused(store: Path, tmp_path: Path):
    (tmp_path / "a").mkdir()
    paths = [write_jsonl(tmp_path / part / "math.jsonl", [{"turns": ["x"]}]) for part in ("a", "")]
    names = ", ".join(f"{{name: {name}}}" for name in (paths[0], paths[1]))
    with pytest.raises(ConfigError, match="several benchmarks are called math"):
        load_benchmarks(Run(tiny_run(store, f"evaluate.benchmarks=[{names}]")))


def test_a_turn_is_rendered_on_the_answers_before_it(store: Path):
    chat, turns = load_chat(Run(tiny_run(store))), ("one", "two", "three")
    assert render_turns(chat, turns).input_ids == chat.render([Message("user", "one")])
    said = [Message("user", "one"), Message("assistant", "1"), Message("user", "two")]
    assert render_turns(chat, turns, ["1"]).input_ids == chat.render(said)
    assert render_turns(chat, turns, ["1", "2"]).input_ids == chat.render(
        [*said, Message("assistant", "2"), Message("user", "three")]
    )
    assert render_turns(chat, turns, ["1"]).digest != render_turns(chat, turns, ["2"]).digest


def test_a_prompt_without_room_for_its_answer_is_told_apart_with_the_reason():
    room = {"max_positions": 100, "max_new_tokens": 40}
    assert too_long(60, **room) == ""
    why = too_long(61, **room)
    assert "61 tokens" in why
    assert "takes 100" in why
    assert "keeps 40" in why


def test_a_result_of_a_known_benchmark_names_its_data_set_and_has_every_turn(
    mt_bench: str, captured: Path, tmp_path: Path
):
    """The second turn goes on from the target's own plain answer, which greedy speculative
    decoding repeats.
    """
    shutil.copytree(captured, tmp_path / "ready")
    settings = "[{name: mt-bench, limit: 3, turns: all}]"
    config = tiny_run(
        tmp_path / "ready", f"evaluate.benchmarks={settings}", "evaluate.temperatures=[0.0]"
    )
    run_train(Run(config))
    rows = read_rows(run_evaluate(Run(config)))
    assert [(row["benchmark"], row["domain"], row["turn"]) for row in rows] == [
        ("mt-bench", "chat", turn) for turn in (0, 0, 0, 1, 1, 1)
    ]
    chat = load_chat(Run(config))
    (benchmark,) = load_benchmarks(Run(config))
    for first, second in zip(rows[:3], rows[3:], strict=True):
        assert first["identical"]
        answer = chat.decode(first["token_ids"], chat.stop_ids())
        assert (
            second["prompt_digest"]
            == render_turns(chat, benchmark.prompts[first["prompt"]], [answer]).digest
        )
    evaluated = Run(config).artifact("evaluate")
    lines = list(lineage_lines(evaluated))
    assert any(
        line.strip().startswith("benchmarks/mt-bench-") and f"data set {mt_bench}" in line
        for line in lines
    )
    manifest = evaluated.manifest()
    assert manifest is not None
    assert any(name.startswith("benchmarks/") for name in manifest.inputs)


def test_a_prompt_that_is_too_long_is_skipped_counted_and_kept_with_its_reason(
    captured: Path, tmp_path: Path
):
    shutil.copytree(captured, tmp_path / "ready")
    path = write_jsonl(
        tmp_path / "mine.jsonl", [{"turns": ["word " * 5000, "and?"]}, {"turns": ["hello"]}]
    )
    overrides = [
        f"evaluate.benchmarks=[{{name: {path}, turns: all}}]",
        "evaluate.temperatures=[0.0]",
    ]
    config = tiny_run(tmp_path / "ready", *overrides)
    run_train(Run(config))
    artifact = run_evaluate(Run(config))
    assert [(row["prompt"], row["turn"]) for row in read_rows(artifact)] == [(1, 0)]
    assert artifact.records()[0].rejected == 1
    (reject,) = map(
        json.loads, artifact.store.read(artifact.path("rejects/00000.jsonl")).decode().splitlines()
    )
    assert (reject["prompt"], reject["turn"], reject["reason"]) == (0, 0, "too_long")
    assert "evaluate.max_new_tokens keeps 12" in reject["detail"]
