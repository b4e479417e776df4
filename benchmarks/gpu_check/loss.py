"""The loss over Qwen3-4B's vocabulary at a small and a usual micro-batch: gradients, speed, memory,
and how often the host waits.
"""

from functools import partial

import torch

from benchmarks.gpu_check.section import Bench, relative_error
from benchmarks.loss import Sizes, chunked, made, plain

QWEN3_4B = Sizes(slots=3584, positions=1024, vocabulary=151_936, hidden=2560, rank=256)
USUAL = 29_260  # slots of a micro-batch of 8,192 tokens in samples of usual length
TINY = Sizes(slots=64, positions=16, vocabulary=128, hidden=16, rank=8)
COMPARED = 256  # slots whose logits fit into memory at once, in float32
# By whether it is in bfloat16: rounding turns some signs of p - q, and with them the gradient.
WITHIN = {False: 1e-3, True: 0.15}
FIELDS = ("states", "features", "w2")


def check(bench: Bench) -> None:
    shape = TINY if bench.rehearse else QWEN3_4B
    for algorithm in ("dspark", "eagle3"):
        for bf16 in (False, True):
            what = f"{algorithm} {'bfloat16' if bf16 else 'float32'}"
            with bench.part(f"{what}: gradients of the plain formula"):
                few = shape._replace(slots=min(COMPARED, shape.slots))
                gradients(bench, few, algorithm, bf16=bf16)
    for slots in (shape.slots, shape.slots if bench.rehearse else USUAL):
        with bench.part(f"{slots} slots"):
            sizes = shape._replace(slots=slots, positions=max(slots // 7, 16))
            for compile in (False,) if bench.rehearse else (False, True):
                speed(bench, sizes, compile=compile)


def step(bench: Bench, parts: dict[str, torch.Tensor], side, algorithm: str, *, bf16: bool):
    for part in parts.values():
        part.grad = None
    with torch.autocast(bench.device.type, dtype=torch.bfloat16, enabled=bf16):
        total = side(parts, algorithm)
    total.backward()
    return total


def gradients(bench: Bench, sizes: Sizes, algorithm: str, *, bf16: bool) -> None:
    parts, found = made(sizes, bench.device), []
    # a CPU would compile for half a minute
    for side in (partial(chunked, compile=not bench.rehearse), plain):
        step(bench, parts, side, algorithm, bf16=bf16)
        found.append([parts[name].grad for name in FIELDS if parts[name].grad is not None])
    errors = [relative_error(ours, theirs) for ours, theirs in zip(*found, strict=True)]
    what = f"{algorithm} {'bfloat16' if bf16 else 'float32'}: gradients of the plain formula"
    bench.findings.check(what, max(errors) <= WITHIN[bf16], f"{max(errors):.1e}")


def speed(bench: Bench, sizes: Sizes, *, compile: bool) -> None:
    parts, how = made(sizes, bench.device), "compiled" if compile else "plain"
    what, side = f"dspark bfloat16, {sizes.slots} slots, {how}", partial(chunked, compile=compile)

    def run() -> None:
        step(bench, parts, side, "dspark", bf16=True)

    taken = bench.seconds(run, rounds=3)
    per_slot = 2 * sizes.vocabulary * (2 * sizes.hidden + 3 * sizes.rank)
    flops = sizes.slots * per_slot + 2 * sizes.positions * sizes.vocabulary * sizes.hidden
    bench.findings.figure(f"{what}: forward and backward, ms", 1e3 * taken)
    bench.findings.figure(f"{what}: TFLOP/s", flops / taken / 1e12)
    inputs = torch.cuda.memory_allocated() / 1e9 if bench.device.type == "cuda" else 0.0
    bench.findings.figure(f"{what}: GB beside the inputs", bench.peak_gb(run) - inputs)
    bench.findings.figure(f"{what}: waits of the host", bench.num_waits(run))
    grads = (parts[name].grad for name in FIELDS)
    finite = all(bool(x.isfinite().all()) for x in grads if x is not None)
    bench.findings.check(f"{what}: gradients are finite", finite)
