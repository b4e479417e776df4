"""Training on every GPU: `python -m deepspec train RUN` is the parent of torchrun's ranks.

It reports for them. On several nodes, `torchrun --nnodes=... --nproc-per-node=... --rdzv-... -m
deepspec train RUN` is started on each; a process that torchrun started starts none itself, it joins
the others (`distributed`). PyTorch is not loaded here.
"""

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from deepspec.artifacts.missing import trains_without_cache
from deepspec.artifacts.run import Run
from deepspec.errors import ChildFailed, ConfigError, TransientError
from deepspec.process.events import Report
from deepspec.process.launch import OnLine, RunRequest, run_child
from deepspec.process.machine import MIG, check_divides, visible_gpus
from deepspec.process.scopes import Stopped, scope

MOST_STOP_S = 3600
ECHO_S = 3.0  # within which torchrun ends a rank after another one has failed
TORCHRUN_FAILED = re.compile(r"^E\d.*\btorch/distributed/elastic/")
KILLED_RANK = re.compile(r"rank +: (\d+).*Signal \d+ \((\w+)\) received", re.DOTALL)
RESUME = "run it again: it goes on from its newest checkpoint"


def is_rank() -> bool:
    """Whether torchrun, or something like it, started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "WORLD_SIZE" in os.environ


def is_first_rank() -> bool:
    """Whether this process reports for all: the others report nothing and log warnings only."""
    return os.environ.get("RANK", "0") == "0"


def num_ranks(run: Run) -> int:
    """How many processes are to train together on this machine.

    Raises:
        ConfigError: more than there are GPUs for, or that a step's samples cannot be dealt to
            evenly.
    """
    training = run.config.resources.training
    gpus = visible_gpus() if run.config.resources.devices.type != "cpu" else []
    if gpus and trains_without_cache(run) and training.source == "rolling":
        captures = training.rolling_gpus
        if captures >= len(gpus):
            raise ConfigError(
                f"rolling capture takes {captures} of {len(gpus)} visible GPUs: none is left to "
                "train on",
                where="resources.training.rolling_gpus",
                fix="lower it (0 captures on the GPU that trains), or use "
                "resources.training.source=online",
            )
        check_divides(run.config.resources.devices.gpus_per_lane, captures, "GPUs that capture")
        gpus = gpus[: len(gpus) - captures]
    if any(gpu.startswith(MIG) for gpu in gpus):
        gpus = gpus[:1]  # CUDA shows a process one part of a divided GPU, and NCCL joins no two
    wanted = training.ranks or max(1, len(gpus))
    if gpus and wanted > len(gpus):
        raise ConfigError(
            f"{wanted} ranks, but {len(gpus)} visible GPUs: each rank needs one of its own, and "
            "parts of divided GPUs (MIG) are one",
            where="resources.training.ranks",
            fix="lower it, or leave it null; resources.devices.type=cpu trains without GPUs",
        )
    check_batch(run.config.train.global_batch, wanted)
    return wanted


def check_batch(global_batch: int, num_ranks: int) -> None:
    """Refuse a batch that gives some ranks more samples than others, which then wait each step.

    Raises:
        ConfigError: names the nearest batches that can be dealt evenly.
    """
    below = global_batch - global_batch % num_ranks
    if below == global_batch:
        return
    nearest = " or ".join(str(value) for value in (below, below + num_ranks) if value)
    fewer = next(ranks for ranks in range(num_ranks, 0, -1) if global_batch % ranks == 0)
    raise ConfigError(
        f"{global_batch} samples a step cannot be dealt evenly to {num_ranks} ranks",
        where="train.global_batch",
        fix=f"set it to {nearest}; or train on {fewer} (resources.training.ranks), which changes "
        "no result",
    )


def launch_ranks(request: RunRequest, ranks: int, *, report: Report, stop_s: float) -> None:
    """Train in `ranks` processes to the end; the first one's events and all logs are passed on.

    SIGTERM is passed on: the ranks save a checkpoint and end, for which they have `stop_s` beyond
    what any child has, or what they ask for once they know.

    Raises:
        DeepSpecError: the first error that a rank reported, as its own class; the other ranks are
            gone.
        TransientError: a rank was killed, or this process was asked to stop.
    """
    python, *verb = request.command("train")
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    # What torchrun would set with a warning: ranks that take all cores each are slower than one.
    env = {
        "DEEPSPEC_EVENTS": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        # The supervisor ends torchrun and its ranks when their time is up; by itself torchrun would
        # after 30 seconds, as one without this setting does.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(MOST_STOP_S),
    }
    with (
        scope(stop_s) as children,
        on_sigterm(lambda: threading.Thread(target=children.close).start()),
    ):
        try:
            run_child([*torchrun, *verb], on_event=report, on_line=lines_before_failure(), env=env)
        except Stopped:
            raise TransientError("training was asked to stop", fix=RESUME) from None
        except ChildFailed as error:
            killed = KILLED_RANK.search(error.what)
            if killed is None:
                raise
            what = f"rank {killed[1]} was killed by {killed[2]}"
            fix = f"{RESUME} (SIGKILL: often out of memory)"
            raise TransientError(what, fix=fix) from None


@contextlib.contextmanager
def on_sigterm(act: Callable[[], object]) -> Iterator[None]:
    """Within the block SIGTERM does this instead of ending the process."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def lines_before_failure() -> OnLine:
    """Copies the ranks' log to standard error, up to torchrun's own account of a failure.

    That is a stack trace that names no cause.
    """
    failed = False

    def show(line: str) -> None:
        nonlocal failed
        failed = failed or bool(TORCHRUN_FAILED.match(line))
        if not failed:
            sys.stderr.write(line + "\n")

    return show
