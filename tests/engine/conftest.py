"""A demo large enough for vLLM's kernels, and drafts of each kind that have learnt something.

`prepared` has answers and hidden states, `trained` the drafts too; both are made once a session, to
be copied and not written to.
"""

import shutil
from pathlib import Path

import pytest

from deepspec.artifacts.run import Run
from deepspec.config.recipes import load_run
from deepspec.config.run import RunConfig
from tests.conftest import made_once

ALGORITHMS = ("dspark", "dflash", "eagle3", "dflash-context")  # the last in the other layout
# Heads of 32, as in the whole demo: vLLM's attention for the CPU takes no smaller ones.
SMALL = [
    "demo.conversations=1500",
    "demo.num_layers=6",
    "demo.steps=40",
    "demo.held_out=8",
    "target.layer_ids=[0, 2, 4]",
    "prompts.limit=192",
    "prompts.shard_rows=48",
    "answers.max_new_tokens=32",
    "answers.sampling.temperature=0",
    "draft.num_anchors=16",
    "train.max_steps=40",
    "train.global_batch=16",
    "train.checkpoint_steps=40",
    "train.acceptance_samples=8",
    "evaluate.max_new_tokens=32",
    "evaluate.temperatures=[0.0]",
    "evaluate.batch_sizes=[1]",
    "resources.storage.min_free_gb=0",
]


def small_run(store: Path, *overrides: str, algorithm: str = "dspark") -> RunConfig:
    """The run of one algorithm in a store that both fixtures below can be copied to."""
    small = [override for override in SMALL if algorithm != "eagle3" or "anchors" not in override]
    algorithm, _, context = algorithm.partition("-")
    if context:
        small.append("draft.layout=anchor_is_context")
    return load_run(f"{algorithm}-demo", [*small, *overrides], store=str(store))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the demo's target, prompts, answers and hidden states."""
    from deepspec.answers.stage import run_answers
    from deepspec.demo.stage import run_demo
    from deepspec.hidden.stage import run_capture
    from deepspec.prompts.stage import run_prompts

    def make(store: Path) -> None:
        run = Run(small_run(store))
        for stage in (run_demo, run_prompts, run_answers, run_capture):
            stage(run)

    return made_once(tmp_path_factory, "prepared-for-engine", make)


@pytest.fixture(scope="session")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That store with a draft of each algorithm."""
    from deepspec.train.loop import run_train

    def make(store: Path) -> None:
        shutil.copytree(prepared, store)
        for algorithm in ALGORITHMS:
            run_train(Run(small_run(store, algorithm=algorithm)))

    return made_once(tmp_path_factory, "trained-for-engine", make)
