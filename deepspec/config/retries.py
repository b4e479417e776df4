"""The section `resources.retries`: what happens after a failure, and when work counts as stuck."""

import random
from typing import Literal, NamedTuple, cast

from pydantic import Field, PositiveFloat

from deepspec.config.section import Section

StageName = Literal["demo", "prompts", "answers", "hidden", "train", "evaluate"]
LONGEST_DELAY_S = 300.0
MOST_DOUBLINGS = 60  # of a delay: a power of two that is still a float, however many the retries
JITTER = 0.3  # share of a delay by which it varies, so that many do not come back at once


class StageRetriesConfig(Section):
    """Retries of a single stage; a field that is null is as for all stages."""

    times: int | None = Field(default=None, ge=0)
    """Times that its work is tried again after a transient failure."""
    delay_s: float | None = Field(default=None, ge=0)
    """Seconds before the first retry."""
    deadline_minutes: PositiveFloat | None = None
    """Minutes that one child process may take."""


class StageLimits(NamedTuple):
    """How often, and after what pause, a stage's work is tried again, and how long one of its
    children may take.
    """

    retries: int
    retry_delay_s: float
    deadline_s: float | None

    def delay_s(self, tries: int) -> float:
        """Seconds before the next try after this many: doubled each time, never the same for two
        that failed together.
        """
        doublings = min(max(tries - 1, 0), MOST_DOUBLINGS)
        delay_s = min(self.retry_delay_s * 2**doublings, LONGEST_DELAY_S)
        return delay_s * random.uniform(1 - JITTER, 1 + JITTER)


class RetriesConfig(Section):
    """What happens after a failure, and when work counts as stuck."""

    times: int = Field(default=3, ge=0)
    """Times that a shard, or a stage without shards, is tried again after a transient failure."""
    delay_s: float = Field(default=2.0, ge=0)
    """Seconds before the first retry; doubled each time, up to five minutes, give or take a
    third.
    """
    deadline_minutes: PositiveFloat | None = None
    """Minutes that one child process (a group of shards, or a whole training) may take before
    it is ended and tried again.
    """
    stages: dict[StageName, StageRetriesConfig] = Field(default_factory=dict)
    """Other retries, delays and deadlines for single stages, e.g. `{train: {times: 10}}`."""
    max_failed: float = Field(default=0.01, ge=0, le=1)
    """Share of a stage's shards that may fail for good (not: wait for another try); above it,
    and above ten, no more begin. 0: none may.
    """
    stall_minutes: PositiveFloat = 30.0
    """Minutes without a finished step or a captured shard after which training dumps its
    threads' stacks and ends, to be tried again.
    """

    def limits(self, stage: str) -> StageLimits:
        """What holds for a stage: its own settings before those of all."""
        own = self.stages.get(cast("StageName", stage), StageRetriesConfig())
        both = self.model_copy(update=own.model_dump(exclude_none=True))
        minutes = both.deadline_minutes
        return StageLimits(both.times, both.delay_s, minutes and 60 * minutes)
