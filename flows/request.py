"""Opening a request: everything that can be wrong with it is found before Prefect, or any work,
is started.
"""

from __future__ import annotations

import importlib.util

from deepspec.artifacts.run import Run
from deepspec.config.recipes import load_run
from deepspec.config.run import RunConfig
from deepspec.errors import ConfigError
from deepspec.process.launch import RunRequest


def open_run(request: RunRequest) -> RunConfig:
    """The run's configuration.

    Raises:
        UserError: a wrong recipe, key, value or input file, or a store that cannot be used.
    """
    config = load_run(request.source, request.overrides, store=request.store)
    if config.resources.runner.kind == "ray":
        require_ray()
    Run(config).store.check_writable(config.resources.storage.min_free_gb)
    Run(config).check_inputs()
    return config


def require_ray() -> None:
    """Refuse a run on Ray where it is not installed.

    Raises:
        ConfigError: says what to install.
    """
    missing = [name for name in ("ray", "prefect_ray") if importlib.util.find_spec(name) is None]
    if missing:
        what = f"the runner `ray` needs {' and '.join(missing)}, not installed here"
        raise ConfigError(
            what,
            where="resources.runner.kind",
            fix="pip install 'deepspec[ray]', on every node of the cluster",
        )
