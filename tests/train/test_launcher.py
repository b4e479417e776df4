"""One command trains on every GPU: torchrun's ranks are started, spoken for, stopped and ended
by it.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from deepspec.artifacts.run import Run
from deepspec.errors import EXIT_TRANSIENT, ConfigError, OutOfMemory, TrainingFailed, TransientError
from deepspec.hidden.rolling_workers import worker_gpus
from deepspec.process.events import silent
from deepspec.process.launch import RunRequest
from deepspec.process.machine import free_port
from deepspec.train import launcher as ranks
from deepspec.train import loop
from deepspec.train.checkpoint_files import checkpoint_records
from deepspec.train.launcher import check_batch, is_rank, launch_ranks, num_ranks
from deepspec.train.loop import run_train
from tests.conftest import REPOSITORY, TINY, tiny_run
from tests.train.test_loop import SMOOTH, assert_close, weights

TWO = ["resources.training.ranks=2", "resources.devices.type=cpu"]
SIX = "train.global_batch=6"
LONG = ["train.max_steps=40", "train.epochs=50", "train.checkpoint_steps=10", *SMOOTH]


@pytest.fixture
def ready(captured: Path, tmp_path: Path) -> Path:
    shutil.copytree(captured, tmp_path / "ready")
    return tmp_path / "ready"


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Has every rank run this code before each step: `sitecustomize` is imported by any Python
    that finds it.
    """

    def write(code: str) -> None:
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(FAULTS + textwrap.dedent(code))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(REPOSITORY)]))

    return write


FAULTS = """
import os, signal

if "LOCAL_RANK" in os.environ:
    from deepspec.train.batches import StepData

    original, rank = StepData.batches, int(os.environ["RANK"])

    def batches(self, step, plan):
        fault(step)
        return original(self, step, plan)

    StepData.batches = batches
"""


def arguments(store: Path, *overrides: str) -> RunRequest:
    return RunRequest("demo", (*TINY, *TWO, *overrides), str(store))


def launched(store: Path, *overrides: str) -> SimpleNamespace:
    heard = SimpleNamespace(events=[])
    launch_ranks(arguments(store, *overrides), 2, report=heard.events.append, stop_s=5)
    return heard


def ranks_of(parent: int) -> list[psutil.Process]:
    return [
        one
        for one in psutil.Process(parent).children(recursive=True)
        if "LOCAL_RANK" in environment_of(one)
    ]


def environment_of(process: psutil.Process) -> dict[str, str]:
    with contextlib.suppress(psutil.Error):
        return process.environ()
    return {}


def test_the_number_of_ranks_is_the_users_or_that_of_visible_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert num_ranks(Run(tiny_run(tmp_path, "train.global_batch=9"))) == 3
    assert num_ranks(Run(tiny_run(tmp_path, "resources.training.ranks=2"))) == 2
    with pytest.raises(ConfigError, match="2 samples a step cannot be dealt evenly to 3 ranks"):
        num_ranks(Run(tiny_run(tmp_path, "train.global_batch=2")))
    assert num_ranks(Run(tiny_run(tmp_path, "resources.devices.type=cpu"))) == 1
    assert (
        num_ranks(
            Run(tiny_run(tmp_path, "resources.devices.type=cpu", "resources.training.ranks=4"))
        )
        == 4
    )
    with pytest.raises(ConfigError, match="4 ranks, but 3 visible GPUs"):
        num_ranks(Run(tiny_run(tmp_path, "resources.training.ranks=4")))
    rolling = tiny_run(tmp_path, "resources.training.source=rolling", "train.global_batch=6")
    assert (num_ranks(Run(rolling)), worker_gpus(rolling.resources)) == (2, ["2"]), (
        "the last GPU captures"
    )
    shared = tiny_run(
        tmp_path,
        "resources.training.source=rolling",
        "resources.training.rolling_gpus=0",
        "train.global_batch=6",
    )
    assert (num_ranks(Run(shared)), worker_gpus(shared.resources)) == (3, [None])
    with pytest.raises(ConfigError, match="takes 3 of 3 visible GPUs"):
        num_ranks(
            Run(
                tiny_run(
                    tmp_path,
                    "resources.training.source=rolling",
                    "resources.training.rolling_gpus=3",
                )
            )
        )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    pairs = ("resources.training.source=rolling", "resources.devices.gpus_per_lane=2")
    in_pairs = tiny_run(tmp_path, *pairs, "resources.training.rolling_gpus=2")
    assert (num_ranks(Run(in_pairs)), worker_gpus(in_pairs.resources)) == (2, ["2,3"])
    with pytest.raises(ConfigError, match="1 GPUs that capture cannot be dealt to lanes of 2"):
        num_ranks(Run(tiny_run(tmp_path, *pairs)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b,MIG-c")
    assert num_ranks(Run(tiny_run(tmp_path))) == 1, "CUDA shows a process one part alone"
    assert (num_ranks(Run(rolling)), worker_gpus(rolling.resources)) == (1, ["MIG-c"])
    with pytest.raises(ConfigError, match=r"2 ranks, but 1 visible GPUs.*\(MIG\) are one"):
        num_ranks(Run(tiny_run(tmp_path, "resources.training.ranks=2")))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert num_ranks(Run(tiny_run(tmp_path))) == 1
    assert (num_ranks(Run(rolling)), worker_gpus(rolling.resources)) == (1, [None])


@pytest.mark.parametrize("name", ["WORLD_SIZE", "TORCHELASTIC_RUN_ID"])
def test_a_process_that_torchrun_started_starts_no_ranks(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    assert not is_rank()
    monkeypatch.setenv(name, "2")
    assert is_rank()


@pytest.fixture(scope="module")
def two_ranks(
    captured: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A store with what two ranks of one node have trained, and what they said."""
    store = tmp_path_factory.mktemp("two") / "store"
    shutil.copytree(captured, store)
    command = arguments(store, SIX).command("train")
    environment = {**os.environ, "DEEPSPEC_EVENTS": "1"}
    return store, subprocess.run(
        command,
        check=True,
        cwd=REPOSITORY,
        env=environment,
        timeout=240,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_one_command_trains_on_two_ranks_of_which_one_reports(ready: Path, two_ranks):
    """What one rank ends with, from samples that differ in length and so in their share of the
    tokens (trap D4).
    """
    store, done = two_ranks
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(event["stage"], event["done"]) for event in events] == [("train", 6)]
    assert done.stderr.count("steps=0 of 6") == 1, done.stderr
    assert "ranks=2" in done.stderr
    assert_close(
        weights(run_train(Run(tiny_run(ready, SIX)))),
        weights(Run(tiny_run(store, SIX)).artifact("train")),
    )


@pytest.mark.slow
def test_two_nodes_train_what_two_ranks_of_one_do(ready: Path, two_ranks, tmp_path: Path):
    """The line of docs/cluster.md, started twice as on two machines: they find each other
    at the rendezvous, and one reports.
    """
    told = {"--nproc-per-node": "1", "--rdzv-endpoint": f"127.0.0.1:{free_port()}"}
    words = documented_command("torchrun --nnodes 2")
    words = [told.get(before, word) for before, word in zip(["", *words], words, strict=False)][
        1 : words.index("-m")
    ]
    node = [sys.executable, "-m", "torch.distributed.run", *words, "--local-addr", "127.0.0.1"]
    command = [*node, *arguments(ready, SIX).command("train")[1:]]
    logs = [tmp_path / "node-0.log", tmp_path / "node-1.log"]
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(guarded(command, log)) for log in logs]
        codes = [one.wait(240) for one in nodes]
    said = [log.read_text() for log in logs]
    assert codes == [0, 0], said
    assert sorted(text.count("steps=0 of 6") for text in said) == [0, 1]
    artifact = Run(tiny_run(ready, SIX)).artifact("train")
    assert artifact.manifest() is not None
    assert_close(weights(artifact), weights(Run(tiny_run(two_ranks[0], SIX)).artifact("train")))


@contextlib.contextmanager
def guarded(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command that is gone, with all it started, when the block is left."""
    command, environment = (
        [sys.executable, "-m", "deepspec.process.supervisor", "5", *command],
        {**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait(30)


def documented_command(start: str) -> list[str]:
    """The command of the document on several machines that starts like this."""
    text = (REPOSITORY / "docs" / "cluster.md").read_text().replace("\\\n", " ")
    (found,) = [line for line in text.splitlines() if line.startswith(start)]
    return shlex.split(found)


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all_and_is_raised_as_its_own_class(
    ready: Path, faulty, capfd: pytest.CaptureFixture[str]
):
    faulty("""
        def fault(step):
            if rank == 1 and step == 2:
                from deepspec.errors import TrainingFailed
                raise TrainingFailed("rank 1 has had enough", where="here", fix="that")
    """)
    with pytest.raises(TrainingFailed, match="rank 1 has had enough") as caught:
        launched(ready)
    assert (caught.value.where, caught.value.fix) == ("here", "that")
    assert "ChildFailedError" not in capfd.readouterr().err


@pytest.mark.long
def test_a_bug_on_one_rank_is_one_paragraph_not_the_lost_connection_of_the_other(
    ready: Path, faulty, capfd: pytest.CaptureFixture[str]
):
    faulty("""
        def fault(step):
            if rank == 1 and step == 2:
                raise ZeroDivisionError("a bug on rank 1")
    """)
    with pytest.raises(ranks.ChildFailed, match="ZeroDivisionError: a bug on rank 1"):
        launched(ready)
    shown = capfd.readouterr().err
    assert "in batches" in shown, "where the bug is, is in the log"
    assert "ChildFailedError" not in shown


@pytest.mark.long
def test_no_rank_waits_for_one_that_is_short_of_memory(
    ready: Path, faulty, two_ranks, capfd: pytest.CaptureFixture[str]
):
    """It does its micro-batches in parts, and all of them end where ranks with enough memory do."""
    faulty("""
        import torch
        from deepspec.model.block_draft import BlockDraft

        whole = BlockDraft.loss

        def loss(self, batch, plan):
            if rank == 1 and len(batch.seeds) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return whole(self, batch, plan)

        BlockDraft.loss = loss

        def fault(step):
            pass
    """)
    launched(ready, SIX)
    assert capfd.readouterr().err.count("done again in two halves") == 1
    artifact = Run(tiny_run(ready, SIX)).artifact("train")
    lines = map(json.loads, artifact.read("metrics.jsonl").decode().splitlines())
    assert sum(line.get("micro_batch_splits", 0) for line in lines) == 6 * 2, "halves of 3, 1 and 2"
    assert_close(weights(Run(tiny_run(two_ranks[0], SIX)).artifact("train")), weights(artifact))


@pytest.mark.long
@pytest.mark.parametrize(("place", "stage"), [("backward", 1), ("forward", 2), ("backward", 3)])
def test_a_rank_short_of_memory_under_deepspeed_names_what_to_set(
    ready: Path, faulty, place: str, stage: int
):
    """Its ranks meet within a micro-batch, so that one cannot do a part of it again."""
    faulty(f"""
        import torch
        from deepspec.model.block_draft import BlockDraft

        whole, place = BlockDraft.loss, {place!r}

        def fail(*_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

        def loss(self, batch, plan):
            output = whole(self, batch, plan)
            if rank == 1 and self.training and stepping:
                fail() if place == "forward" else output.numerator.register_hook(fail)
            return output

        BlockDraft.loss = loss
        stepping = []

        def fault(step):
            if step == 2:
                stepping.append(True)
    """)
    sets = [SIX, "train.strategy=deepspeed", f"resources.memory.zero_stage={stage}"]
    with pytest.raises(OutOfMemory, match="does not fit into memory: CUDA out of memory") as caught:
        launched(ready, *sets)
    assert "resources.memory.batch_tokens (now " in caught.value.fix
    assert f"zero_stage (now {stage})" in caught.value.fix
    assert "train.strategy ddp does a micro-batch again in halves" in caught.value.fix


@pytest.mark.slow
def test_a_rank_that_is_killed_is_worth_another_try(
    ready: Path, faulty, capfd: pytest.CaptureFixture[str]
):
    faulty("""
        def fault(step):
            if rank == 1 and step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
    """)
    with pytest.raises(TransientError, match="rank 1 was killed by SIGKILL"):
        launched(ready)
    assert "ChildFailedError" not in capfd.readouterr().err


@pytest.mark.long
def test_a_stalled_rank_is_named_by_its_stack_though_the_first_one_reports(
    ready: Path, faulty, capfd: pytest.CaptureFixture[str]
):
    """Rank 0 waits for rank 1 and is the one to say so; the culprit's stack must be in the log
    by then.
    """
    faulty("""
        def fault(step):
            if rank == 1 and step == 2:
                stalled_read()

        def stalled_read():
            import time
            time.sleep(600)
    """)
    with pytest.raises(TransientError, match="no training step was finished"):
        launched(ready, "resources.retries.stall_minutes=0.1")
    shown = capfd.readouterr().err
    assert "in stalled_read" in shown
    assert "in sum" in shown, "rank 0, in the collective"


def interrupt(store: Path, number: int) -> int:
    """Train until there is a checkpoint, then send the signal to the command; its exit code,
    all its ranks gone.
    """
    artifact = Run(tiny_run(store, *LONG)).artifact("train")
    with subprocess.Popen(
        arguments(store, *LONG).command("train"), cwd=REPOSITORY, stderr=subprocess.DEVNULL
    ) as parent:
        limit = time.monotonic() + 60
        while not checkpoint_records(artifact):
            assert time.monotonic() < limit
            time.sleep(0.02)
        ranks_found = ranks_of(parent.pid)
        assert len(ranks_found) == 2
        parent.send_signal(number)
        code = parent.wait(40)
    assert psutil.wait_procs(ranks_found, timeout=0 if number == signal.SIGTERM else 20)[1] == []
    assert not artifact.store.exists(artifact.path("manifest.json"))
    return code


@pytest.mark.slow
def test_two_ranks_that_are_stopped_save_and_go_on_as_if_they_had_not_been(
    ready: Path, tmp_path: Path
):
    straight = tmp_path / "straight"
    shutil.copytree(ready, straight)
    assert interrupt(ready, signal.SIGTERM) == EXIT_TRANSIENT
    artifact = Run(tiny_run(ready, *LONG)).artifact("train")
    assert list(checkpoint_records(artifact))[-1] > 10, "one more was written upon the signal"
    launched(ready, *LONG)
    assert_close(weights(artifact), weights(run_train(Run(tiny_run(straight, *LONG)))))


@pytest.mark.long
def test_no_rank_outlives_a_command_that_was_killed(ready: Path):
    assert interrupt(ready, signal.SIGKILL) == -signal.SIGKILL


@pytest.mark.long
def test_training_has_the_time_to_stop_that_its_steps_need(ready: Path, faulty, monkeypatch):
    """A step of a 4B draft takes 45 seconds on one GPU: its ranks were killed after 13."""
    faulty("""
        import time

        def fault(step):
            time.sleep(7)
            if rank == 0 and step == 1:
                os.kill(int(os.environ["STOPPED_IN_STEP_1"]), signal.SIGTERM)
                time.sleep(7)
    """)
    monkeypatch.setenv("STOPPED_IN_STEP_1", str(os.getpid()))
    heard = list[dict[str, object]]()
    with pytest.raises(TransientError, match="asked to stop"):
        # 5 seconds beside what the ranks ask for, after a step of 7
        launch_ranks(arguments(ready, *LONG), 2, report=heard.append, stop_s=0)
    (asked,) = [event["seconds"] for event in heard if event["event"] == "stop_time"]
    assert 1.5 * 7 < float(str(asked)) < 60
    assert list(checkpoint_records(Run(tiny_run(ready, *LONG)).artifact("train"))) == [2]


@pytest.mark.long
def test_ranks_stuck_in_a_collective_end_by_themselves_when_they_are_to_stop(
    ready: Path, faulty, tmp_path: Path
):
    """Their Python handlers never run, and torchrun kills them only after 30 seconds."""
    faulty("""
        def fault(step):
            if step != 2:
                return
            import pathlib, time
            import torch.distributed as dist

            while rank == 1:
                time.sleep(1)
            wait = dist.all_reduce

            def all_reduce(*inputs, **options):
                pathlib.Path(os.environ["STUCK"]).touch()
                return wait(*inputs, **options)

            dist.all_reduce = all_reduce
    """)
    stuck, log = tmp_path / "stuck", tmp_path / "log"
    _, *verb = arguments(ready, *LONG, "resources.runner.stop_s=1").command("train")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*torchrun, *verb],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "STUCK": str(stuck)},
            stdout=output,
            stderr=output,
        )
    try:
        limit = time.monotonic() + 120
        while not stuck.exists():
            assert time.monotonic() < limit and process.poll() is None
            time.sleep(0.05)
        found = ranks_of(process.pid)
        assert len(found) == 2
        time.sleep(1)
        began = time.monotonic()
        process.terminate()
        process.wait(60)
        assert psutil.wait_procs(found, timeout=0)[1] == []
        assert time.monotonic() - began < 20
    finally:
        process.kill()
    shown = log.read_text()
    assert shown.count("training was asked to stop and could not within 3 s") == 2
    assert "in sum" in shown, "rank 0, in the collective"


@pytest.mark.long
def test_a_rank_that_waits_for_one_that_has_failed_ends_at_once(ready: Path, faulty, tmp_path):
    """NCCL's collectives do not notice it, where gloo's lose their connection."""
    faulty(f"""
        import time

        def fault(step):
            if rank == 1 and step == 2:
                time.sleep(2)
                from deepspec.errors import TrainingFailed
                with open({str(tmp_path / "failed")!r}, "w") as file:
                    file.write(str(time.time()))
                raise TrainingFailed("rank 1 has had enough")
            if step == 2:
                from datetime import timedelta
                from torch.distributed import distributed_c10d as c10d
                c10d._get_default_store().wait(["never"], timedelta(minutes=5))
    """)
    with pytest.raises(TrainingFailed, match="rank 1 has had enough"):
        launched(ready, "resources.runner.stop_s=100")
    assert time.time() - float((tmp_path / "failed").read_text()) < 20


@pytest.mark.long
def test_ranks_save_by_the_clock_of_the_first_one(ready: Path, faulty):
    faulty("""
        from deepspec.train.checkpoint_clock import CheckpointClock

        CheckpointClock.is_due = lambda self: rank == 1 or self.due

        def fault(step):
            CheckpointClock.due = step == 4
    """)
    launched(ready, SIX, "train.checkpoint_steps=100")
    artifact = Run(tiny_run(ready, SIX, "train.checkpoint_steps=100")).artifact("train")
    assert list(checkpoint_records(artifact)) == [5, 6]


TWELVE = ["train.max_steps=12", "train.checkpoint_steps=4", SIX, *SMOOTH]


@pytest.fixture(scope="module")
def undisturbed(
    captured: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """What twelve steps of one rank end in that nobody killed; a rank's, not this process's:
    threads decide the last bit.
    """
    straight = tmp_path_factory.mktemp("straight") / "store"
    shutil.copytree(captured, straight)
    launch_ranks(arguments(straight, *TWELVE), 1, report=silent, stop_s=5)
    return weights(Run(tiny_run(straight, *TWELVE)).artifact("train"))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1)])
def test_a_training_that_was_killed_goes_on_with_another_number_of_ranks(
    undisturbed, ready, faulty, tmp_path: Path, before, after
):
    """Kill -9 in the sixth step, amid an epoch as the fourth step's checkpoint is; bit for bit
    on the same number of ranks.
    """
    faulty(f"""
        def fault(step):
            marker = {str(tmp_path / "killed")!r}
            if rank == 0 and step == 5 and not os.path.exists(marker):
                open(marker, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
    """)
    artifact = Run(tiny_run(ready, *TWELVE)).artifact("train")
    with pytest.raises(TransientError, match="killed by SIGKILL"):
        launch_ranks(arguments(ready, *TWELVE), before, report=silent, stop_s=5)
    assert list(checkpoint_records(artifact)) == [4]
    launch_ranks(arguments(ready, *TWELVE), after, report=silent, stop_s=5)
    resumed = weights(artifact)
    assert_close(undisturbed, resumed)
    if before == after:
        assert all(torch.equal(tensor, undisturbed[name]) for name, tensor in resumed.items())


@pytest.mark.parametrize(
    ("batch", "ranks", "fix"),
    [
        (512, 3, "set it to 510 or 513; or train on 2 (resources.training.ranks)"),
        (2, 4, "set it to 4; or train on 2 (resources.training.ranks)"),
        (7, 2, "set it to 6 or 8; or train on 1 (resources.training.ranks)"),
    ],
)
def test_a_batch_that_cannot_be_dealt_evenly_is_refused_with_those_that_can(
    batch: int, ranks: int, fix: str
):
    with pytest.raises(
        ConfigError, match=f"{batch} samples a step cannot be dealt evenly to {ranks} ranks"
    ) as refused:
        check_batch(batch, ranks)
    assert refused.value.where == "train.global_batch"
    assert refused.value.fix.startswith(fix)


def test_the_batch_is_looked_at_before_the_cache_is_opened(
    captured: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also where torchrun started the ranks itself, on several nodes."""
    world = loop.join_world("cpu", dtype="float32", timeout=loop.timedelta(seconds=1))._replace(
        size=3
    )
    monkeypatch.setattr(loop, "join_world", lambda *_, **__: world)
    monkeypatch.setattr(loop, "open_source", lambda *_, **__: pytest.fail("the cache was opened"))
    with pytest.raises(ConfigError, match="8 samples a step cannot be dealt evenly to 3 ranks"):
        run_train(Run(tiny_run(captured)))
