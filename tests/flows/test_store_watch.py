"""Work that is done elsewhere is seen in the store: each missing shard counts once, when it is
committed.
"""

import threading
from pathlib import Path

import pytest

from deepspec.answers.stage import run_answers
from deepspec.artifacts.run import Run
from deepspec.artifacts.status import stage_status
from deepspec.config.recipes import load_run
from deepspec.process.progress_display import Progress
from deepspec.prompts.stage import run_prompts
from flows.reporting import watched_by
from flows.stage_progress import StageProgress
from flows.store_watch import StoreWatch, watching_store


@pytest.mark.filterwarnings("ignore:Artifact creation outside")
def test_each_shard_that_appears_is_added_once_and_no_other(run_file: Path):
    config = load_run(
        str(run_file), ("resources.retries.times=0", "answers.engine=tests.engines:Echo")
    )
    run_prompts(Run(config))
    run_answers(Run(config), shards=[0])
    artifact = Run(config).artifact("answers")
    stale = artifact.records([0])[0]
    seen, two_seen = list[Progress](), threading.Event()

    def see(progress: Progress) -> None:
        seen.append(progress)
        if progress.done == 3:
            two_seen.set()

    before = stage_status(Run(config), "answers")
    with watched_by(see):
        progress = StageProgress("elsewhere", before, sharded=True)
        with watching_store(
            StoreWatch(artifact, before._replace(missing=[1, 2, 3]), progress, poll_s=0.02)
        ):
            run_answers(Run(config), shards=[1, 2])
            assert two_seen.wait(60)
            assert {progress.done for progress in seen} == {1, 2, 3}
            run_answers(Run(config), shards=[3, 4])
    assert seen[-1].done == 4, "shard 4 was not to be watched"
    assert seen[-1].numbers["rows"] == 6
    assert artifact.records([0])[0] == stale
