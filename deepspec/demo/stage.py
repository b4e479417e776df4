"""The demo stage: the tiny target, its prompts and its benchmarks, kept in the store like any
artifact.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.run import Run
from deepspec.demo.build import build_demo
from deepspec.errors import ConfigError
from deepspec.process.events import Report, silent


def run_demo(run: Run, report: Report = silent) -> Artifact:
    """Make and seal the demo's folder, unless it is there already."""
    config = run.config
    if config.demo is None:
        raise ConfigError(
            "this run has no demo section", where="demo", fix="use one of the demo recipes"
        )
    artifact = run.create("demo")
    if artifact.manifest() is not None:
        return artifact

    def progress(done: int, total: int, numbers: dict[str, float]) -> None:
        report(
            {
                "event": "progress",
                "stage": "demo",
                "done": done,
                "total": total,
                "unit": "steps",
                **numbers,
            }
        )

    with tempfile.TemporaryDirectory() as scratch:
        build_demo(Path(scratch), config.demo, on_progress=progress)
        names = sorted(
            path.relative_to(scratch).as_posix()
            for path in Path(scratch).rglob("*")
            if path.is_file()
        )
        for name in names:
            artifact.put_file(Path(scratch) / name, name)
    artifact.seal(files=names, inputs={})
    return artifact
