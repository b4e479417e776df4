"""NCCL in a world of one, and DeepSpeed where it is installed: each stage of ZeRO ends where ddp
does, and either goes on from the other's checkpoint.
"""

import importlib.util
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from benchmarks.gpu_check.section import Bench, relative_error
from deepspec.answers.stage import run_answers
from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.run import Run
from deepspec.demo.stage import run_demo
from deepspec.hidden.stage import run_capture
from deepspec.prompts.stage import run_prompts
from deepspec.train.checkpoint_files import checkpoint_records
from deepspec.train.distributed import form_group
from deepspec.train.loop import run_train
from tests.conftest import tiny_run

# A loss without the kinks of total variation, where rounding turns a gradient round.
RUN = [
    "train.max_steps=20",
    "train.checkpoint_steps=10",
    "train.global_batch=6",
    "loss.tv=0",
    "loss.ce=1",
]
ZERO = "train.strategy=deepspeed"
WITHIN = 1e-3  # 20 steps of float32, added up in another order


def check(bench: Bench) -> None:
    with bench.part("collectives"):
        store = dist.HashStore()  # type: ignore[attr-defined]
        form_group(bench.device, store=store, rank=0, world_size=1)
        value = torch.full((3,), 2.0, dtype=torch.float64, device=bench.device)
        dist.all_reduce(value)
        dist.barrier()
        bench.wait()
        bench.findings.check("collectives", value.tolist() == [2.0] * 3, dist.get_backend())
    is_there = importlib.util.find_spec("deepspeed") is not None
    bench.findings.figure("DeepSpeed is installed", is_there)
    if is_there:
        with bench.part("ddp"):
            zero(bench)


def tiny(bench: Bench, store: Path, *overrides: str) -> Run:
    return Run(tiny_run(store, *RUN, f"resources.devices.type={bench.device.type}", *overrides))


def weights(artifact: Artifact) -> dict[str, torch.Tensor]:
    return load_file(artifact.fetch_folder("draft") / "model.safetensors")


def back_to(step: int, artifact: Artifact) -> None:
    """As if it had been killed after that step's checkpoint."""
    for later in [number for number in checkpoint_records(artifact) if number > step]:
        artifact.store.remove(artifact.path(f"checkpoints/{later:08d}"))
    artifact.store.remove(artifact.path("manifest.json"))


def zero(bench: Bench) -> None:
    captured, ddp = bench.scratch / "captured", bench.scratch / "ddp"
    for stage in (run_demo, run_prompts, run_answers, run_capture):
        stage(tiny(bench, captured))
    shutil.copytree(captured, ddp)
    wanted = weights(run_train(tiny(bench, ddp)))

    def compare(what: str, store: Path, *overrides: str) -> None:
        with bench.part(what):
            found = weights(run_train(tiny(bench, store, *overrides)))
            error = max(relative_error(found[name], wanted[name]) for name in wanted)
            bench.findings.check(what, error <= WITHIN, f"{error:.1e}")

    for number in (2,) if bench.rehearse else (1, 2, 3):
        store = bench.scratch / f"zero{number}"
        shutil.copytree(captured, store)
        compare(
            f"ZeRO {number} ends where ddp does",
            store,
            ZERO,
            f"resources.memory.zero_stage={number}",
        )
        back_to(10, tiny(bench, store).artifact("train"))
        compare(f"ddp goes on from a checkpoint of ZeRO {number}", store)
    back_to(10, tiny(bench, ddp).artifact("train"))
    compare("ZeRO 2 goes on from a checkpoint of ddp", ddp, ZERO)
