"""What is missing is decided by the store alone; a redone shard makes what was made from it
stale.
"""

from pathlib import Path

import pytest

from deepspec.answers.stage import run_answers
from deepspec.artifacts.missing import wanted_shards
from deepspec.artifacts.records import Counts
from deepspec.artifacts.run import Run
from deepspec.artifacts.side_files import put_failure
from deepspec.artifacts.status import results, stage_status
from deepspec.errors import ArtifactMismatch, ConfigError
from deepspec.process.shard_ranges import parse_shards
from deepspec.prompts.stage import run_prompts
from tests.conftest import tiny_run

ECHO = "answers.engine=tests.engines:Echo"


@pytest.mark.parametrize(
    ("text", "shards"),
    [
        ("", []),
        ("17", [17]),
        ("17,18,40-42", [17, 18, 40, 41, 42]),
        (" 3 , 1-2,", [1, 2, 3]),
        ("5,5", [5]),
    ],
)
def test_shard_lists_are_numbers_and_ranges(text: str, shards: list[int]):
    assert parse_shards(text) == shards


@pytest.mark.parametrize("text", ["x", "1-", "3-1", "-2", "1;2"])
def test_a_malformed_shard_list_is_refused(text: str):
    with pytest.raises(ConfigError, match="not a shard"):
        parse_shards(text)


def test_a_stage_needs_the_one_before_it_finished(store: Path):
    with pytest.raises(ArtifactMismatch, match="'answers' reads 'prompts', which is not finished"):
        run_answers(Run(tiny_run(store, ECHO)))


def test_redoing_a_prompt_shard_makes_the_answers_of_that_shard_missing(store: Path):
    config = tiny_run(store, ECHO)
    prompts = run_prompts(Run(config))
    run_answers(Run(config))
    assert stage_status(Run(config), "answers").sealed
    prompts.store.remove(prompts.path("records/00002.json"))
    with prompts.store.staged() as local:
        local.write_bytes(b"other prompts")
        prompts.commit(2, local, Counts(rows=4), upstream=None)
    status = stage_status(Run(config), "answers")
    assert (status.missing, status.sealed) == ([2], False)


def test_status_counts_rows_tokens_bytes_and_failures(store: Path):
    config = tiny_run(store, ECHO)
    run_prompts(Run(config))
    before = stage_status(Run(config), "answers")
    assert (before.committed, before.missing, before.sealed) == (0, [0, 1, 2, 3, 4, 5], False)
    artifact = run_answers(Run(config), shards=[1, 2])
    put_failure(artifact, 0, ConfigError("broken"))
    after = stage_status(Run(config), "answers")
    assert (after.committed, after.missing, after.rows, after.failures) == (
        2,
        [0, 3, 4, 5],
        8,
        {0: "broken"},
    )
    assert after.num_bytes == sum(record.num_bytes for record in artifact.records().values())


def test_results_say_when_there_are_none(store: Path):
    with pytest.raises(ArtifactMismatch, match="no results yet"):
        results(Run(tiny_run(store)))


def test_wanted_shards_are_those_of_the_stage_before_with_their_checksums(store: Path):
    config = tiny_run(store, ECHO)
    run_prompts(Run(config))
    records = Run(config).artifact("prompts").records()
    assert wanted_shards(Run(config), "answers") == {
        shard: record.checksum for shard, record in records.items()
    }
