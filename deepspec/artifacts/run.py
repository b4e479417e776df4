"""A run opened once: its configuration, its store, and the artifact of each of its stages.

An artifact is named by the fingerprint of everything that decides its content, and of nothing else.
The chain of fingerprints is the lineage: a result names its draft, the draft its hidden states,
they their answers, and those their prompts. `resources` is in no fingerprint.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import ArtifactInput, ArtifactKey
from deepspec.artifacts.stages import BENCHMARKS, BENCHMARKS_FORMAT, STAGES, Stage
from deepspec.config.benchmarks import BenchmarkSet
from deepspec.config.recipes import load_run
from deepspec.config.run import RunConfig
from deepspec.storage.store import canonical_json
from deepspec.storage.urls import open_store


class Run:
    """What every stage of a run works with.

    Keys are computed once, each when it is first needed: a machine that only trains need not have
    the files that only the evaluation reads.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        resources = config.resources
        self.store = open_store(
            config.store, scratch=resources.storage.scratch, uploads=resources.checks.uploads
        )
        self._artifacts: dict[str, Artifact] = {}

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The run's stages in the order in which they are run.

        What a user brings is read before a minute goes into training the demo's target.
        """
        demo, prompts, *others = STAGES.values()
        if self.config.demo is None:
            return prompts, *others
        if prompts.reads_demo(self.config):
            return demo, prompts, *others
        return prompts, demo, *others

    def artifact(self, stage: str) -> Artifact:
        """The artifact that this run's stage reads or makes, whether or not it is there.

        Raises:
            DataError: a prompts or benchmark file that does not exist.
        """
        if stage not in self._artifacts:
            self._artifacts[stage] = Artifact(self.store, self._key(STAGES[stage]))
        return self._artifacts[stage]

    def upstream(self, stage: str) -> Artifact:
        """The artifact of the stage before, which gives a sharded stage its shard numbers."""
        before = STAGES[stage].before
        assert before is not None  # noqa: S101 - only stages that have one ask
        return self.artifact(before)

    def create(self, stage: str) -> Artifact:
        """The stage's artifact, its `artifact.json` written or compared.

        Raises:
            ArtifactMismatch: the folder was made by another recipe.
        """
        artifact = self.artifact(stage)
        artifact.create(self.config.model_dump(mode="json"))
        return artifact

    def benchmark(self, benchmark: BenchmarkSet) -> Artifact:
        """The artifact of a known benchmark's prompts in this run's store."""
        return Artifact(self.store, benchmark_key(benchmark))

    def check_inputs(self) -> None:
        """Check that every file that any stage of the run reads is there.

        Raises:
            DataError: one is missing.
        """
        for stage in self.stages:
            self.artifact(stage.name)

    def command(self, verb: str) -> str:
        """The command that runs a verb of this run, as its user would type it."""
        return f"python -m deepspec {verb} {self.config.typed}"

    def _key(self, stage: Stage) -> ArtifactKey:
        upstream = [self.artifact(name).key for name in stage.reads(self.config)]
        benchmarks = [benchmark_key(known) for known in stage.known_benchmarks(self.config)]
        inputs = [key.as_input() for key in (*upstream, *benchmarks)]
        name, recipe = stage.folder(self.config), stage.recipe(self.config)
        return _fingerprinted(stage.name, name, stage.format, recipe, inputs)


def open_run(source: str, overrides: Sequence[str] = (), *, store: str | None = None) -> Run:
    """The run that a recipe or a run file describes.

    Raises:
        ConfigError: an unknown recipe, key or value.
    """
    return Run(load_run(source, overrides, store=store))


def benchmark_key(benchmark: BenchmarkSet) -> ArtifactKey:
    """The key of a known benchmark's prompts, the same for every run that reads them."""
    recipe = benchmark.model_dump(mode="json", exclude={"domain", "num_prompts"})
    return _fingerprinted(BENCHMARKS, benchmark.name, BENCHMARKS_FORMAT, recipe, ())


def _fingerprinted(
    stage: str, name: str, format: int, recipe: dict[str, Any], inputs: Sequence[ArtifactInput]
) -> ArtifactKey:
    content = {
        "stage": stage,
        "format": format,
        "recipe": recipe,
        "inputs": [entry.fingerprint for entry in inputs],
    }
    fingerprint = hashlib.sha256(canonical_json(content)).hexdigest()[:12]
    return ArtifactKey(stage, name, fingerprint, recipe, tuple(inputs), format)
