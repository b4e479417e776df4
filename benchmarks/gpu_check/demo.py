"""The demo by its verbs, one process each: DSpark in float32, stopped amid training and gone on
with; the same in bfloat16 from an int8 cache; Eagle3.
"""

import math
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Sequence

from benchmarks.gpu_check.section import Bench
from deepspec.artifacts.run import Run
from deepspec.artifacts.status import results, training_lines
from deepspec.config.recipes import load_run
from deepspec.errors import EXIT_TRANSIENT
from deepspec.process.events import parse_event
from deepspec.process.launch import RunRequest
from tests.conftest import TINY

ALL = ("demo", "prompts", "answers", "hidden", "train", "evaluate")
SMALL = [  # a minute of GPU: a target that has learnt little, thirty held-out prompts
    "demo.conversations=1200",
    "demo.steps=60",
    "demo.held_out=10",
    "prompts.limit=384",
    "answers.max_new_tokens=64",
    "evaluate.max_new_tokens=48",
    "evaluate.batch_sizes=[8]",
    "train.max_steps=60",
    "train.checkpoint_steps=30",
]
LONG = ["train.max_steps=80"]
IN_BFLOAT16 = ["target.dtype=bfloat16", "train.compute_dtype=bfloat16", "hidden.codec=int8"]


class Verbs:
    """A run in a store of the section's, done verb by verb."""

    def __init__(self, bench: Bench, recipe: str, sets: Sequence[str]) -> None:
        self.bench, self.recipe, self.name = bench, recipe, recipe
        self.store = bench.scratch.parent / "store"  # for other sections, too
        small = TINY if bench.rehearse else SMALL
        if recipe.startswith("eagle3"):
            small = [override for override in small if not override.startswith("draft.")]
            small += ["target.layer_ids=[0,1,2]"] if bench.rehearse else []
        self.sets = [*small, *sets, f"resources.devices.type={bench.device.type}"]

    @property
    def run(self) -> Run:
        return Run(load_run(self.recipe, self.sets, store=str(self.store)))

    def command(self, verb: str) -> list[str]:
        return RunRequest(self.recipe, tuple(self.sets), str(self.store)).command(verb)

    def do(self, *verbs: str) -> bool:
        """Whether all of them end well; those after one that does not are left out."""
        for verb in verbs:
            began = time.perf_counter()
            status = subprocess.run(self.command(verb), check=False).returncode
            name = f"{self.name} {verb}"
            self.bench.findings.figure(f"{name}, s", time.perf_counter() - began)
            self.bench.findings.check(f"{name}: ends well", status == 0, f"exit code {status}")
            if status:
                return False
        return True

    def stop_training(self) -> None:
        """Ask the training to stop at its first line of progress; it saves, and ends as one that
        may go on.
        """
        child = subprocess.Popen(
            self.command("train"),
            env={**os.environ, "DEEPSPEC_EVENTS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        asked = False
        assert child.stdout is not None
        for line in child.stdout:  # to its end: the child writes into it
            event = parse_event(line)
            if not asked and event is not None and event["event"] == "progress":
                child.send_signal(signal.SIGTERM)
                asked = True
        status = child.wait()
        last = training_lines(self.run)[-1]["step"]
        ok = status == EXIT_TRANSIENT and 0 < last < self.run.config.train.max_steps
        what = f"{self.name} train: saves when it is stopped"
        self.bench.findings.check(what, ok, f"exit code {status}, step {last}")

    def judge(self) -> None:
        """The loss has fallen, and the answers are the target's own."""
        find = self.bench.findings
        losses = [line["loss"] for line in training_lines(self.run) if "loss" in line]
        third = max(1, len(losses) // 3)
        early, late = statistics.fmean(losses[:third]), statistics.fmean(losses[-third:])
        # from a rehearsal's target, which has made four steps, there is nothing to learn
        fell = math.isfinite(late) if self.bench.rehearse else late < early
        find.check(f"{self.name}: the loss falls", fell, f"{early:.3f} to {late:.3f}")
        found = results(self.run)
        same, total = found.lossless
        exact = self.run.config.target.dtype == "float32"
        # of few prompts below float32 the gaps where answers part may be too few to judge by
        ok = same == total if exact else found.losslessness.ok is not False
        find.check(f"{self.name}: lossless", ok, f"{same} of {total}; {found.losslessness.words}")
        find.figure(f"{self.name}: acceptance length", found.acceptance_length["macro"])
        for kind, value in found.tokens_per_s.model_dump().items():
            find.figure(f"{self.name}: tokens/s, {kind}", value)


def dspark_demo(bench: Bench, *sets: str) -> Verbs:
    # A tiny training is to be long enough to be stopped.
    return Verbs(bench, "dspark-demo", [*LONG, *sets] if bench.rehearse else sets)


def check(bench: Bench) -> None:
    dspark = dspark_demo(bench)
    bfloat16 = dspark_demo(bench, *IN_BFLOAT16)
    bfloat16.name = "in bfloat16 from int8"
    eagle3 = Verbs(bench, "eagle3-demo", LONG if bench.rehearse else [])
    with bench.part("dspark-demo"):
        if dspark.do(*ALL[:4]):
            dspark.stop_training()
            if dspark.do(*ALL[4:]):
                dspark.judge()
    with bench.part("eagle3-demo"):
        if eagle3.do(*ALL[3:]):  # prompts and answers are DSpark's
            eagle3.judge()
    with bench.part(bfloat16.name):
        if bfloat16.do(*ALL[2:]):
            bfloat16.judge()
