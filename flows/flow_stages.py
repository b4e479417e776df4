"""Which stages each flow makes; a run has some or all of them."""

from itertools import takewhile

from deepspec.artifacts.stages import STAGES

STAGES_OF: dict[str, tuple[str, ...]] = {
    "pipeline": tuple(STAGES),
    "prepare": tuple(takewhile(lambda name: name != "train", STAGES)),
    **{stage.flow: (stage.name,) for stage in STAGES.values() if stage.flow},
}
