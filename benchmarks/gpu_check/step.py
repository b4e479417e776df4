"""A training step of DSpark at Qwen3-4B's shape with random weights: speed, memory, and the same
loss however it is run.
"""

import torch

from benchmarks._training import QWEN3_4B, random_cache
from benchmarks.gpu_check.section import Bench
from benchmarks.train_step import CPU, Shape, Steps, mfu, parts
from deepspec.model.chunked_loss import chunk_elements
from deepspec.model.execution import Execution
from deepspec.model.step_memory import StepMemory, StepSize
from deepspec.target.peak_memory import ITEM_BYTES
from deepspec.train.strategy import loss_computed_in

# Samples of usual length (tokens, how many), whose slots are nearly as many as a batch may have.
USUAL = (910, 9)
TINY = (40, 4)
ROUNDS, KERNELS = 5, 20
SAME_LOSS, OF_PLAN = 1e-3, 0.1
EXECUTIONS = {
    "plain": Execution(),
    "recompute": Execution(recompute=True),
    "compiled": Execution(compile=True),
}


def check(bench: Bench) -> None:
    with bench.part("a trainer"):
        steps = make(bench, *(TINY if bench.rehearse else USUAL))
        for kind in EXECUTIONS:
            if bench.rehearse and kind == "compiled":
                continue  # a CPU compiles for half a minute
            with bench.part(kind):
                same_loss(bench, steps, kind)
                measure(bench, steps, kind)
            if kind == "plain":
                with bench.part("profile"):
                    profile(bench, steps)


def make(bench: Bench, num_tokens: int, num_samples: int) -> Steps:
    tiny = Shape("demo", CPU.target, num_tokens, ("draft.num_anchors=4",))
    shape = tiny if bench.rehearse else Shape("dspark-qwen3-4b", QWEN3_4B, num_tokens)
    folder = bench.scratch / "cache"
    lengths, hidden_size = {num_tokens: 3 * num_samples}, shape.target["hidden_size"]
    cache = random_cache(folder, lengths, hidden_size=hidden_size)
    batch_tokens = num_samples * num_tokens
    steps = Steps(shape, cache, folder, batch_tokens=batch_tokens, device=bench.device)
    if not bench.rehearse:  # which computes in float32
        steps.strategy.draft.hold_frozen(torch.bfloat16)
    return steps


def loss(steps: Steps, kind: str) -> float:
    """Of the batch, with the weights as they are."""
    draft, settings = steps.strategy.draft, steps.trainer.settings
    draft.execution = EXECUTIONS[kind]
    plan = draft.plan(steps.batch)
    output = loss_computed_in(settings.compute_dtype, draft, steps.batch, plan)
    return float(output.numerator / output.denominator)


def same_loss(bench: Bench, steps: Steps, kind: str) -> None:
    plain, other = loss(steps, "plain"), loss(steps, kind)
    what = f"{kind}: the loss does not depend on how it is run"
    bench.findings.check(what, abs(plain - other) <= SAME_LOSS * plain, (plain, other))


def measure(bench: Bench, steps: Steps, kind: str) -> None:
    """Whole steps: memory, speed, and what the host waits for."""
    num_tokens = int(steps.batch.lengths.sum())
    steps.strategy.draft.execution = EXECUTIONS[kind]
    figure = bench.findings.figure
    steps.whole()  # the optimizer has its state then
    peak, planned = bench.peak_gb(steps.whole), planned_gb(steps, kind)
    figure(f"{kind}: peak GB of a step", peak)
    ok = bench.rehearse or abs(peak - planned) <= OF_PLAN * planned
    bench.findings.check(f"{kind}: peak memory is the plan's", ok, f"planned {planned:.3g} GB")
    before = {key: x.detach().clone() for key, x in steps.strategy.parameters.items()}
    steps.trainer.throughput.read(1)
    taken = bench.seconds(steps.whole, rounds=ROUNDS)
    pace = steps.trainer.throughput.read(1)
    bench.findings.check(
        f"{kind}: steps change the weights, which stay finite",
        any(not torch.equal(before[key], x) for key, x in steps.strategy.parameters.items())
        and all(bool(x.isfinite().all()) for x in steps.strategy.parameters.values()),
    )
    figure(f"{kind}: tokens/s", num_tokens / taken)
    figure(f"{kind}: share that waits for data", pace.data_wait_share)
    figure(f"{kind}: waits of the host in a step", bench.num_waits(steps.whole))
    if kind == "plain" and not bench.rehearse:
        flops = steps.flops()
        figure(f"{kind}: TFLOP of a step", flops / 1e12)
        figure(f"{kind}: MFU", mfu(flops, taken))
        for part, work in parts(steps).items():
            figure(f"{kind}: {part}, TFLOP by arithmetic", work["tflop"])
            figure(f"{kind}: {part}, GB by arithmetic", work["gb"])


def planned_gb(steps: Steps, kind: str) -> float:
    """The peak by the arithmetic of `plan`."""
    memory = StepMemory(
        steps.strategy.draft.spec,
        item=ITEM_BYTES["bfloat16"],
        frozen_item=ITEM_BYTES["bfloat16"],
        compiled=EXECUTIONS[kind].compile,
        recompute=EXECUTIONS[kind].recompute,
        chunk=chunk_elements(steps.trainer.world.device),
    )
    slots = sum(sample.num_slots for sample in steps.group)
    size = StepSize(sum(sample.num_tokens for sample in steps.group), slots)
    return (memory.held(1, None) + memory.micro_batch(size)) / 1e9


def profile(bench: Bench, steps: Steps) -> None:
    """The kernels that take longest, into the log."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        steps.whole()
        bench.wait()
    averages = profiler.key_averages()
    order = "self_cpu_time_total" if bench.rehearse else "self_device_time_total"
    print(averages.table(sort_by=order, row_limit=KERNELS), flush=True)
    on_device = sum(event.self_device_time_total for event in averages)
    bench.findings.figure("plain: the GPU is busy in a step, ms", on_device / 1e3)
