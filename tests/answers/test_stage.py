"""The answers stage with engines that need no model: what is kept, what is refused, what is
tried again.
"""

from pathlib import Path

import pytest

from deepspec.answers.stage import answer_shards, run_answers
from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.missing import open_sharded
from deepspec.artifacts.run import Run
from deepspec.artifacts.tables import read_table
from deepspec.errors import ConfigError, ShardsFailed
from deepspec.process.events import silent
from deepspec.prompts.stage import run_prompts
from tests.answer_server import answer_server
from tests.answers.asking import server_run
from tests.conftest import tiny_run

ECHO = "answers.engine=tests.engines:Echo"


FLAKY = "answers.engine=tests.engines:Flaky"


def all_rows(artifact: Artifact) -> list[dict]:
    return [
        row
        for record in artifact.records().values()
        for row in read_table(artifact.fetch_shard(record)).to_pylist()
    ]


def test_every_prompt_is_answered_once_and_keeps_its_id_and_split(store: Path):
    config = tiny_run(store, ECHO)
    prompts = all_rows(run_prompts(Run(config)))
    answers = all_rows(run_answers(Run(config)))
    assert [(a["id"], a["held_out"], a["domain"]) for a in answers] == [
        (p["id"], p["held_out"], p["domain"]) for p in prompts
    ]
    assert all(len(answer["turns"]) == 1 for answer in answers)


@pytest.mark.parametrize(
    "settings",
    [
        ("answers.retry_max_new_tokens=99",),
        ("answers.truncated=retry", "answers.retry_max_new_tokens=3"),
    ],
)
def test_a_larger_limit_that_is_none_is_refused(store: Path, settings: tuple[str, ...]):
    with pytest.raises(ConfigError, match="retry_max_new_tokens goes with"):
        tiny_run(store, *settings)


def test_a_shard_counts_its_turns_and_truncations(store: Path):
    config = tiny_run(store, ECHO)
    run_prompts(Run(config))
    counts = [record.counts for record in run_answers(Run(config)).records().values()]
    assert all(entry["turns"] == 4 and entry["truncated"] == 0 for entry in counts)


def test_a_failing_shard_leaves_the_others_committed_and_is_named(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Shard 3 fails once as transient, shard 5 for good: the next runs do only what is missing."""
    monkeypatch.setenv("FLAKY_DIR", str(tmp_path))
    (tmp_path / "broken").touch()
    config = tiny_run(store, FLAKY)
    run_prompts(Run(config))
    with pytest.raises(ShardsFailed) as caught:
        run_answers(Run(config))
    assert sorted(caught.value.failures) == [3, 5]
    assert caught.value.retryable == [3]
    assert "shard 5: the prompt cannot be rendered" in str(caught.value)
    calls = tmp_path / "calls"
    calls.unlink()
    with pytest.raises(ShardsFailed):
        run_answers(Run(config), shards=[3, 5])
    assert calls.read_text().split() == ["3", "5"]
    calls.unlink()
    (tmp_path / "broken").unlink()
    artifact = run_answers(Run(config))
    assert calls.read_text().split() == ["5"]
    assert artifact.manifest() is not None


def test_the_digest_does_not_depend_on_the_order_in_which_shards_were_made(
    store: Path, tmp_path: Path
):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(store, other)
    digests = []
    for place, order in ((store, [None]), (other, [[4], [0, 2], None])):
        config = tiny_run(place, ECHO)
        run_prompts(Run(config))
        for shards in order:
            artifact = run_answers(Run(config), shards=shards)
        manifest = artifact.manifest()
        assert manifest is not None
        digests.append(manifest.digest)
    assert digests[0] == digests[1]


def test_a_shard_that_does_not_exist_is_refused(store: Path):
    config = tiny_run(store, ECHO)
    run_prompts(Run(config))
    with pytest.raises(ConfigError, match="no shard 99; there are 0 to 5"):
        run_answers(Run(config), shards=[99])


def test_of_two_workers_that_sampled_the_same_shard_the_first_ones_stands(store: Path):
    with answer_server(lambda body, before: "truncate" if before else "answer") as server:
        config = server_run(store, server.url)
        run_prompts(Run(config))
        stages = [open_sharded(Run(config), "answers", [0]) for _ in range(2)]
        for stage in stages:
            answer_shards(Run(config), stage, silent)
        (record,) = stages[1].artifact.records().values()
    assert len(server.bodies) == 8
    assert record.counts["truncated"] == 0
    assert {
        path.name
        for path in Path(stage.artifact.store.root, stage.artifact.folder, "shards").iterdir()
    } == {Path(record.file).name}
