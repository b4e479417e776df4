"""The demo stage: a tiny target with its prompts and benchmarks, an artifact like any other."""

import tempfile
from pathlib import Path

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.run import Run
from deepspec.demo.build import build_demo
from deepspec.errors import ConfigError
from deepspec.process.events import Report, silent


def run_demo(run: Run, report: Report = silent) -> Artifact:
    """Make and seal the demo's folder, unless it is there already."""
    if (config := run.config.demo) is None:
        raise ConfigError(
            "this run has no demo section", where="demo", fix="use one of the demo recipes"
        )
    artifact = run.create("demo")
    if artifact.manifest() is not None:
        return artifact
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build_demo(folder, config, report)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        for name in names:
            artifact.put_file(folder / name, name)
    artifact.seal(files=names, inputs={})
    return artifact
