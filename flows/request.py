"""Opening a request: everything that can be wrong with it is found before Prefect, or any work, is
started.
"""

import importlib.util

from deepspec.artifacts.run import Run, open_run
from deepspec.errors import ConfigError
from deepspec.process.launch import RunRequest


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
