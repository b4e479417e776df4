"""Opening a request: everything that can be wrong with it is found before Prefect, or any work, is
started.
"""

import functools
import importlib.util
import logging
from collections.abc import Sequence

from deepspec.artifacts.run import Run, open_run
from deepspec.errors import ConfigError
from deepspec.process.events import silent
from deepspec.process.launch import RunRequest, run_child
from deepspec.process.machine import visible_gpus

log = logging.getLogger(__name__)


def checked_run(request: RunRequest) -> Run:
    """The requested run.

    Raises:
        UserError: a wrong recipe, key, value or input file, or a store that cannot be used.
    """
    run = open_run(request.source, request.overrides, store=request.store)
    resources = run.config.resources
    if resources.runner.kind == "ray":
        require_ray()
    run.store.check_writable(resources.storage.min_free_gb)
    run.check_inputs()
    return run


def check_devices(request: RunRequest, run: Run, stages: Sequence[str]) -> None:
    """Return where the GPUs of this machine can do what is left of these stages, if it has any.

    Raises:
        ConfigError: a GPU is visible and cannot be used.
    """
    resources = run.config.resources
    on_gpu = {"hidden", "train", "evaluate"}
    if run.config.answers.engine == "transformers":
        on_gpu.add("answers")
    left = (name for name in stages if name in on_gpu and run.artifact(name).manifest() is None)
    wanted = resources.devices.type
    if resources.runner.kind != "local" or wanted == "cpu" or not any(left):
        return
    if wanted == "cuda" or visible_gpus():
        _look_at_devices(request)


@functools.lru_cache
def _look_at_devices(request: RunRequest) -> None:
    """In a child, since it takes PyTorch; once for all flows of a pipeline."""
    run_child(
        request.command("devices"), on_event=silent, on_line=log.info, env={"DEEPSPEC_EVENTS": "1"}
    )


def require_ray() -> None:
    """Return where Ray and what connects it with Prefect are installed.

    Raises:
        ConfigError: names what to install.
    """
    missing = [name for name in ("ray", "prefect_ray") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the runner `ray` needs {' and '.join(missing)}, not installed here",
            where="resources.runner.kind",
            fix="pip install 'deepspec[ray]', on every node of the cluster",
        )
