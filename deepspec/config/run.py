"""A run: one frozen pydantic model a section, every field with a description and a unit.

Everything under `resources` is about how the work is done and stays out of every fingerprint; all
other fields decide what the result is. How recipes are found, merged and overridden is in
`recipes.py`.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

from pydantic import Field, model_validator

from deepspec.config.data import AnswersConfig, HiddenConfig, PromptsConfig
from deepspec.config.draft import DraftConfig, LossConfig, TrainConfig
from deepspec.config.evaluate import EvaluateConfig
from deepspec.config.resources import ResourcesConfig
from deepspec.config.section import Section
from deepspec.config.target import DemoConfig, TargetConfig


class RunConfig(Section):
    """A whole run, from prompts to results."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """Name of the run: lower-case letters, digits, dot, dash, underscore."""
    store: str
    """Artifact store: a local folder or `s3://bucket/prefix`."""
    demo: DemoConfig | None = None
    """The embedded target and corpus; only where `target.model` is `demo`."""
    target: TargetConfig
    prompts: PromptsConfig
    answers: AnswersConfig = AnswersConfig()
    hidden: HiddenConfig = HiddenConfig()
    draft: DraftConfig
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig
    resources: ResourcesConfig = ResourcesConfig()

    def with_resources(self, **changes: Mapping[str, Any]) -> "RunConfig":
        """The same run with other values in sections of `resources`; they are not validated."""
        sections = {
            name: getattr(self.resources, name).model_copy(update=values)
            for name, values in changes.items()
        }
        resources = self.resources.model_copy(update=sections)
        return self.model_copy(update={"resources": resources})

    @cached_property  # no field, and not compared: `load_run` sets it
    def typed(self) -> str:
        """The run as a command takes it, with overrides and store; `RUN` where none was typed."""
        return "RUN"

    @property
    def partitions_weights(self) -> bool:
        """Whether a rank of training holds only a part of the draft's weights."""
        return self.train.strategy == "deepspeed" and self.resources.memory.zero_stage == 3

    @model_validator(mode="after")
    def _demo_is_whole(self) -> Self:
        if (self.target.model == "demo") != (self.demo is not None):
            raise ValueError("target.model `demo` and the section `demo` belong together")
        uses_demo = self.prompts.source.kind == "demo" or any(
            b.name.startswith("demo/") for b in self.evaluate.benchmarks
        )
        if uses_demo and self.demo is None:
            raise ValueError("demo prompts and demo benchmarks need the section `demo`")
        return self

    @model_validator(mode="after")
    def _engine_has_servers_where_it_needs_them(self) -> Self:
        sampling, servers = self.answers.sampling, self.resources.servers
        if self.answers.engine == "openai" and bool(servers.endpoints) == (servers.start != "none"):
            raise ValueError(
                "answers.engine `openai` needs servers: either resources.servers.endpoints, e.g. "
                "[http://127.0.0.1:8000/v1], or resources.servers.start"
            )
        if sampling.presence_penalty and "transformers" in (servers.start, servers.dialect):
            raise ValueError(
                "answers.sampling.presence_penalty: `transformers serve` does not know it"
            )
        penalties = (sampling.repetition_penalty, sampling.presence_penalty)
        if self.answers.engine == "transformers" and penalties != (1.0, 0.0):
            raise ValueError(
                "answers.sampling.repetition_penalty and presence_penalty need a server: "
                "answers.engine `openai`"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_has_both_servers(self) -> Self:
        servers = self.resources.servers
        endpoints = {servers.plain_endpoint, servers.draft_endpoint} - {None}
        if self.evaluate.engine == "openai" and len(endpoints) < 2:
            raise ValueError(
                "evaluate.engine `openai` needs two servers: resources.servers.plain_endpoint of"
                " the target alone, and resources.servers.draft_endpoint of it with the draft"
            )
        return self

    @model_validator(mode="after")
    def _patience_has_samples(self) -> Self:
        for name, value in {
            "train.acceptance_samples": self.train.acceptance_samples,
            "prompts.held_out": self.prompts.held_out,
        }.items():
            if self.train.patience is not None and not value:
                raise ValueError(
                    f"train.patience needs {name}: without held-out samples no checkpoint is "
                    "known to be better than another"
                )
        return self

    @model_validator(mode="after")
    def _compiled_functions_find_their_weights(self) -> Self:
        if self.resources.training.compile is True and self.partitions_weights:
            raise ValueError(
                "resources.training.compile needs whole weights on every rank: set it to auto or "
                "false, or take resources.memory.zero_stage 2"
            )
        return self

    @model_validator(mode="after")
    def _draft_has_what_it_reads_and_learns_from(self) -> Self:
        draft, loss = self.draft, self.loss
        confidence = None if draft.algorithm == "eagle3" else draft.confidence
        if self.evaluate.verify != "full" and not confidence:
            raise ValueError(
                "evaluate.verify: the draft has no confidence head to cut its blocks by; choose "
                "full, or draft.confidence"
            )
        if self.hidden.last_hidden == "none" and (
            draft.algorithm == "eagle3" or loss.tv > 0 or confidence
        ):
            raise ValueError("hidden.last_hidden `none` serves only a dflash draft with loss.tv 0")
        if draft.algorithm == "eagle3":
            if self.target.layer_ids[0] < 0:
                raise ValueError("eagle3 cannot read layer -1, the embedding output")
        elif not loss.ce + loss.tv + (loss.confidence if confidence else 0):
            raise ValueError(
                "loss.ce, loss.tv and loss.confidence are all 0 for this draft: there is nothing "
                "to learn from"
            )
        return self
