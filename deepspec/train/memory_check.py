"""Whether a rank's training fits its GPU, before the target or a sample is read."""

import json

from deepspec.artifacts.missing import trains_without_cache
from deepspec.artifacts.run import Run
from deepspec.hidden.metadata import CONFIG
from deepspec.target.chat import target_folder
from deepspec.target.gpu_room import require_room_for
from deepspec.target.loading import read_text_config
from deepspec.train.distributed import World


def require_training_room(run: Run, world: World, *, compiled: bool) -> None:
    """Refuse settings with which a step cannot fit this rank's GPU; a CPU is never refused.

    Raises:
        ConfigError: as `require_room_for`.
        DataError: there is no cache, and the target's config cannot be read.
    """
    if world.device.type != "cuda":
        return
    config = run.config
    if trains_without_cache(run):
        target = read_text_config(config.target, folder=target_folder(run)).to_dict()
    else:
        target = json.loads(run.artifact("hidden").fetch_file(CONFIG).read_bytes())
        config = config.with_resources(training={"source": "cache"})
    require_room_for(
        config, "train", world.device, target=target, ranks=world.size, compiled=compiled
    )
