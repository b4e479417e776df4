"""Every way in which a user resumes, and every death before it: only what is missing runs, nothing
twice, nothing lost.

A real server, a real worker and real children, killed one by one and all together; the engine's
calls are counted.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deepspec.artifacts.run import Run
from deepspec.artifacts.status import stage_status
from deepspec.config.recipes import load_run
from deepspec.config.run import RunConfig
from deepspec.prompts.stage import run_prompts
from deepspec.train.checkpoint_files import checkpoint_records
from tests.conftest import TINY, tiny_run
from tests.flows.conftest import flaky_run
from tests.flows.machines import FLOW, LANE, SERVER, WORKER, Machines, machines, wait_until

LONG = [
    "resources.training.ranks=2",
    "resources.devices.type=cpu",
    "train.max_steps=3000",
    "train.epochs=1000",
    "train.checkpoint_steps=10",
]
OVERRIDES = [
    "answers.engine=tests.flows.engines:Waiting",
    "resources.retries.delay_s=5",  # a lane that lost a shard asks for its next group sooner
]


class Site:
    """Machines with a run of six shards, of which each test has a store of its own."""

    def __init__(self, machines: Machines, run_file: Path) -> None:
        self.machines, self.run_file = machines, run_file
        self.regenerate, self.train = machines.deploy("regenerate"), machines.deploy("train")

    def prompts(self, store: Path) -> RunConfig:
        config = load_run(str(self.run_file), OVERRIDES, store=str(store))
        run_prompts(Run(config))
        return config

    def begin(self, store: Path, **parameters: object) -> str:
        return self.machines.begin(
            self.regenerate,
            recipe=str(self.run_file),
            overrides=OVERRIDES,
            store=str(store),
            **parameters,
        )

    def begin_and_wait(self, store: Path) -> str:
        """A run that has committed shards 0 and 1 and has begun with shard 2, which takes as
        long as the test likes.
        """
        (self.machines.folder / "slow").touch()
        run, config = self.begin(store), load_run(str(self.run_file), OVERRIDES, store=str(store))
        wait_until(
            lambda: stage_status(Run(config), "answers").committed == 2 and self.noted()[-1] == 2,
            "two shards",
        )
        return run

    def go_on(self) -> None:
        (self.machines.folder / "slow").unlink()

    def noted(self) -> list[int]:
        notes = self.machines.folder / "calls"
        return [int(line) for line in notes.read_text().split()] if notes.exists() else [-1]

    def calls(self) -> list[int]:
        """The shards that the engine was given since the last look."""
        found = self.noted()
        (self.machines.folder / "calls").unlink()
        return found


@pytest.fixture(scope="module")
def site(database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("machines")
    with pytest.MonkeyPatch.context() as monkeypatch, machines(folder, database) as made:
        run_file = flaky_run(folder, monkeypatch)
        made.start_server()
        made.make_pool()
        made.start_worker()
        yield Site(made, run_file)


@pytest.mark.long
def test_a_killed_lane_server_and_worker_are_survived_and_the_retry_button_makes_what_failed(
    site: Site, tmp_path: Path
):
    config, broken = site.prompts(tmp_path), site.machines.folder / "broken"
    broken.touch()
    run = site.begin_and_wait(tmp_path)
    assert site.machines.kill(LANE) == 2, "a child and its guard"
    wait_until(
        lambda: site.noted() == [0, 1, 2, 3], "the next group: shard 2 waits for its next try"
    )
    site.machines.kill(WORKER)
    site.machines.kill(SERVER)
    site.machines.start_server()
    site.go_on()
    assert site.machines.ended(run) == "FAILED", "a run outlives its worker, and its server"
    assert (
        "1 of 6 shards of the stage 'answers' failed: shard 5"
        in site.machines.state(run)["message"]
    )
    assert sorted(site.calls()) == [0, 1, 2, 2, 3, 4, 5], "shard 2 alone was lost with the lane"
    broken.unlink()
    site.machines.start_worker()
    assert site.machines.set_state(run, "SCHEDULED", "AwaitingRetry") == "ACCEPT"
    wait_until(lambda: stage_status(Run(config), "answers").sealed, "the last shard")
    assert site.machines.ended(run) == "COMPLETED"
    assert site.calls() == [5]


@pytest.mark.slow
def test_a_killed_run_crashes_at_once_and_resumes_by_shards_by_retry_and_after_a_reboot(
    site: Site, tmp_path: Path
):
    config = site.prompts(tmp_path)
    run = site.begin_and_wait(tmp_path)
    site.machines.kill(FLOW)
    assert site.machines.ended(run) == "CRASHED"
    wait_until(lambda: not site.machines.processes(LANE), "the end of the children", seconds=15)
    assert site.calls() == [0, 1, 2]
    site.go_on()
    assert site.machines.ended(site.begin(tmp_path, shards="3")) == "COMPLETED"
    assert site.calls() == [3] and stage_status(Run(config), "answers").missing == [2, 4, 5]
    (site.machines.folder / "slow").touch()
    site.machines.set_state(run, "SCHEDULED", "AwaitingRetry")
    wait_until(lambda: site.noted() == [2], "the retry")
    assert site.machines.kill() >= 5, "a server, a worker, a run, a guard, a child"
    assert site.machines.processes() == [] and site.calls() == [2]
    site.go_on()
    site.machines.start_server()
    site.machines.start_worker()
    assert site.machines.ended(site.begin(tmp_path)) == "COMPLETED", "the same parameters"
    assert site.calls() == [2, 4, 5] and stage_status(Run(config), "answers").sealed


@pytest.mark.long
def test_no_rank_of_a_training_outlives_a_cancelled_run_and_its_checkpoints_are_kept(
    site: Site, captured: Path, tmp_path: Path
):
    """Of a killed one neither: tests/train/test_launcher.py."""
    store = tmp_path / "store"
    shutil.copytree(captured, store)
    artifact = Run(tiny_run(store, *LONG)).artifact("train")
    run = site.machines.begin(site.train, recipe="demo", overrides=[*TINY, *LONG], store=str(store))
    wait_until(lambda: checkpoint_records(artifact), "a checkpoint")
    everyone = family(site.machines.processes(FLOW))
    assert sum("LOCAL_RANK" in one.environ() for one in everyone) == 2 and len(everyone) >= 7, (
        "a run, two guards, a child, torchrun, ranks"
    )
    saved = list(checkpoint_records(artifact))
    assert site.machines.set_state(run, "CANCELLING", "Cancelling") == "ACCEPT"
    # On a busy machine steps take longer, and their time to stop with them.
    _, left = psutil.wait_procs(everyone, timeout=60)
    assert left == []
    assert site.machines.ended(run) == "CANCELLED"
    assert list(checkpoint_records(artifact))[-1] >= saved[-1]
    assert not artifact.store.exists(artifact.path("manifest.json"))


def family(found: list[psutil.Process]) -> list[psutil.Process]:
    return [*found, *(child for one in found for child in one.children(recursive=True))]
