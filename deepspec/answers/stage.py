"""The answers stage: the target answers every prompt itself, so that a draft learns to predict it.

Every assistant turn is generated on the conversation as generated so far. The in-process engine is
the default and needs nothing but the target.
"""

from collections.abc import Sequence
from functools import partial

from deepspec.answers.answered_shard import write_answers
from deepspec.answers.engines import answered_shards
from deepspec.answers.progress import AnswerProgress
from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.missing import ShardedStage, open_sharded, seal_if_whole
from deepspec.artifacts.run import Run
from deepspec.artifacts.shard_loop import work_through
from deepspec.process.events import Report, silent


def run_answers(
    run: Run, *, shards: Sequence[int] | None = None, report: Report = silent
) -> Artifact:
    """Answer the missing ones of `shards` (None: all), and seal once none is missing.

    Raises:
        ShardsFailed: naming every shard that failed, and why.
    """
    stage = open_sharded(run, "answers", shards)
    if stage.todo:
        answer_shards(run, stage, report)
    seal_if_whole(run, "answers")
    return stage.artifact


def answer_shards(run: Run, stage: ShardedStage, report: Report) -> None:
    """Answer and commit the shards that the stage has to do.

    Raises:
        ShardsFailed: naming every shard that failed, and why.
    """
    servers = run.config.resources.servers
    make = partial(write_answers, stage.artifact, max_refused=servers.max_refused)
    progress = AnswerProgress(stage.todo, report, every_s=servers.progress_s)
    with answered_shards(run, stage, progress) as todo:
        work_through(run, stage.artifact, todo, make, report, repeatable=todo.repeatable)
