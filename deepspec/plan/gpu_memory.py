"""Peak memory of each stage on a GPU, and the settings that fit it, as a plan shows them."""

import torch

from deepspec.errors import ConfigError
from deepspec.formatting import human_bytes
from deepspec.model.memory import GPU_SHARE
from deepspec.plan.parts import MemoryPart, Number
from deepspec.target.gpu_room import fitting_rows, training_advice
from deepspec.target.peak_memory import PROMPT_TOKENS, StageMemory


def planned_gpu(gpu_gb: float | None, device: torch.device) -> Number | None:
    """Bytes of a GPU of so many GB, or of the one at hand; None where there is neither."""
    if gpu_gb is not None:
        return Number(gpu_gb * 1e9, "as given", human_bytes)
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return Number(found.total_memory, found.name, human_bytes)


def memory_part(stages: StageMemory, gpu: Number) -> MemoryPart:
    """The stages' peaks on such GPUs, and the settings with which they fit."""
    config, usable = stages.config, GPU_SHARE * gpu
    # The GPUs of a lane share its target; a rank of training has one GPU.
    num_gpus = config.resources.devices.gpus_per_lane
    ranks = config.resources.training.ranks or max(1, torch.cuda.device_count())
    most_rows = stages.memory.answer_rows
    rows = max(1, min(most_rows, fitting_rows(stages.answers, num_gpus * usable)))
    evaluated = max(config.evaluate.batch_sizes)
    size = stages.step_size

    def peak(num_bytes: float, origin: str, gpus: int = num_gpus) -> Number:
        shared = f" on {gpus} GPUs" if gpus > 1 else ""
        fits = "" if num_bytes <= gpus * usable else "does NOT fit: "
        return Number(num_bytes / gpus, f"{fits}{origin}{shared}", human_bytes)

    prompts = f"prompts of {PROMPT_TOKENS:,}"
    of_answers = peak(stages.answers(rows), f"rows {rows} of {most_rows}, {prompts}")
    return MemoryPart(
        gpu=gpu,
        usable=Number(usable, "the rest is lost between tensors", human_bytes),
        answers=of_answers if config.answers.engine == "transformers" else None,
        capture=peak(stages.capture(), f"{size.tokens:,} tokens"),
        training=peak(
            stages.training(ranks), f"{size.tokens:,} tokens, {size.slots:,} slots", gpus=1
        ),
        evaluation=peak(stages.evaluation(evaluated), f"rows {evaluated}, {prompts}"),
        training_fits=training_advice(stages, usable, ranks=ranks),
    )


def require_gpu_holds(part: MemoryPart | None) -> None:
    """Refuse a plan of which some stage needs more than the GPU has.

    Raises:
        ConfigError: naming the stages, and what would fit.
    """
    if part is None:
        return
    peaks = {
        "answers": part.answers,
        "capture": part.capture,
        "training": part.training,
        "evaluation": part.evaluation,
    }
    too_large = {name: peak for name, peak in peaks.items() if (peak or 0) > part.usable}
    if not too_large:
        return
    what = " and ".join(
        f"{name} needs {human_bytes(peak or 0)}" for name, peak in too_large.items()
    )
    fix = "use a larger GPU, or more of them for the target (resources.devices.gpus_per_lane)"
    if [*too_large] == ["training"]:
        fix = part.training_fits
    raise ConfigError(
        f"{what} of {human_bytes(part.usable)} that can be used of the GPU",
        where="resources.memory",
        fix=f"{fix}, or --force to plan without being refused",
    )
