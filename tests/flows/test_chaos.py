"""200 scripted shards over two workers while a random thing is killed every second or so; then run
again to the end.

Whatever died, the sealed digest is that of an undisturbed run, no committed shard was made
again, and no process is left. DEEPSPEC_CHAOS_KILLS=30 python -m pytest tests/flows/test_chaos.py
kills more often than the suite has time for.
"""

import contextlib
import os
import random
import signal
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
import yaml

from deepspec.answers.stage import run_answers
from deepspec.artifacts.run import Run
from deepspec.artifacts.status import stage_status
from deepspec.config.recipes import load_run
from deepspec.config.run import RunConfig
from deepspec.prompts.stage import run_prompts
from tests.conftest import write_jsonl
from tests.flows.conftest import flaky_run
from tests.flows.machines import FLOW, LANE, SERVER, WORKER, Machines, machines, wait_until
from tests.processes import command_of

SHARDS, WORKERS, RUNS = 200, 2, 2
KILLS = int(os.environ.get("DEEPSPEC_CHAOS_KILLS", "5"))
PAUSE_S = 1.5  # between two kills
PACE_S = 0.02 * KILLS  # of a shard, so that there is work left to disturb until the last kill
HALVES = ("0-99", "100-199")
PENDING_S = 30.0  # that a worker takes at most to start a run's process
FIVE = [LANE, LANE, FLOW, WORKER, SERVER]  # of five kills


@pytest.fixture
def chaos_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of 200 prompts, each a shard."""
    path = flaky_run(tmp_path, monkeypatch)
    fields = yaml.safe_load(path.read_text())
    write_jsonl(
        tmp_path / "prompts.jsonl", [{"prompt": f"question {number}"} for number in range(SHARDS)]
    )
    fields["prompts"]["shard_rows"], fields["answers"]["engine"] = 1, "tests.flows.engines:Paced"
    # a group that is killed comes back: nothing is given up here
    fields["resources"]["runner"]["shards_per_task"] = 25
    fields["resources"]["retries"]["times"] = 100
    path.write_text(yaml.safe_dump(fields))
    return path


def undisturbed(run_file: Path, store: Path) -> RunConfig:
    config = load_run(str(run_file), store=str(store))
    run_prompts(Run(config))
    run_answers(Run(config))
    return config


def digest(config: RunConfig) -> str:
    manifest = Run(config).artifact("answers").manifest()
    assert manifest is not None
    return manifest.digest


def committed(config: RunConfig) -> dict[str, int]:
    """Modification times of all records: a shard that is made again would show a new one."""
    return {
        path.name: path.stat().st_mtime_ns
        for path in Path(Run(config).artifact("answers").url, "records").glob("*.json")
    }


class Chaos:
    """Two workers and two runs, kept at work; each kill is somebody's by chance, with a fixed
    seed.
    """

    def __init__(self, made: Machines, run_file: Path) -> None:
        self.machines, self.run_file, self.chance = made, run_file, random.Random(8)
        self.deployment, self.killed, self.begun = made.deploy("regenerate"), Counter[str](), 0

    def keep_going(self) -> None:
        """What a site's service manager and its users do: start again what is gone; a run of
        everything, or of one half.
        """
        if not self.machines.processes(SERVER):
            self.machines.start_server()
        for number in range(WORKERS):
            if not self.machines.processes(f"worker-{number}"):
                self.machines.start_worker(number)
        for _ in range(RUNS - len(self.machines.processes(FLOW)) - self.waiting()):
            self.begin(["", *HALVES][self.begun % 3])

    def waiting(self) -> int:
        """Runs that a worker is about to start. One that was killed just then leaves its run
        pending for ever: it is not waited for.
        """
        found = self.machines.post(
            "flow_runs/filter", flow_runs={"state": {"type": {"any_": ["SCHEDULED", "PENDING"]}}}
        )
        old = datetime.now(UTC) - timedelta(seconds=PENDING_S)
        return sum(
            run["state_type"] == "SCHEDULED"
            or datetime.fromisoformat(run["state"]["timestamp"]) > old
            for run in found
        )

    def at_work(self) -> bool:
        return bool(
            self.waiting() or self.machines.processes(FLOW) or self.machines.processes(LANE)
        )

    def begin(self, shards: str) -> str:
        self.begun += 1
        return self.machines.begin(self.deployment, recipe=str(self.run_file), shards=shards)

    def order(self) -> list[str]:
        return self.chance.sample(FIVE * -(-KILLS // 5), KILLS)

    def kill(self, kind: str) -> None:
        """SIGKILL to one process of a kind, as soon as there is one: a child or its guard, a
        run, a worker, the server.
        """
        wait_until(lambda: self.killed_one(kind), f"a process {kind!r} to kill")
        self.killed[kind] += 1

    def killed_one(self, kind: str) -> bool:
        if not (found := self.machines.processes(kind)):
            self.keep_going()
            return False
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself
            self.chance.choice(found).send_signal(signal.SIGKILL)
            return True
        return False


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_whatever_is_killed_the_digest_is_that_of_a_quiet_run_and_no_process_is_left(
    chaos_run: Path, database: Path, tmp_path: Path
):
    quiet = digest(undisturbed(chaos_run, tmp_path / "quiet"))
    config = load_run(str(chaos_run))
    run_prompts(Run(config))
    (tmp_path / "pace").write_text(str(PACE_S))
    with machines(tmp_path, database) as made:
        made.start_server()
        made.make_pool()
        chaos = Chaos(made, chaos_run)
        wait_until(lambda: begun(chaos, config), "the first shard", pause_s=1.0)
        for kind in chaos.order():
            before = committed(config)
            chaos.kill(kind)
            time.sleep(PAUSE_S)
            chaos.keep_going()
            after = committed(config)
            assert all(after.get(name) == made_at for name, made_at in before.items()), (
                "a committed shard was made again"
            )
        left = stage_status(Run(config), "answers").missing
        assert 0 < len(left) < SHARDS, "the last kill still disturbed something"
        (tmp_path / "pace").unlink()
        wait_until(
            lambda: finished(chaos, config),
            f"the end after {dict(chaos.killed)}",
            seconds=180,
            pause_s=1.0,
        )
        assert digest(config) == quiet
        assert len(committed(config)) == SHARDS and committed(config).items() >= after.items()
        wait_until(lambda: not chaos.at_work(), "the end of runs and children")
        for kind in (WORKER, SERVER):
            for process in made.processes(kind):
                process.terminate()
            wait_until(lambda kind=kind: not made.processes(kind), f"the end of {kind}")
        assert [command_of(process) for process in made.processes()] == []
    print(
        f"killed: {dict(chaos.killed)}, runs: {chaos.begun}, "
        f"missing after the last kill: {len(left)}"
    )


def begun(chaos: Chaos, config: RunConfig) -> bool:
    chaos.keep_going()
    return bool(committed(config))


def finished(chaos: Chaos, config: RunConfig) -> bool:
    """Whether the artifact is sealed; where nobody works on it any more, a run of what is
    missing is begun.
    """
    if not stage_status(Run(config), "answers").sealed:
        chaos.keep_going()
        return False
    return True
