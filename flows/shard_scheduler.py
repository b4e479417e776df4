"""Deals the missing shards of a stage out to lanes in groups that last minutes, each lane as many
as it has shown to manage.

A lane asks when it has nothing to do, so a fast one asks more often; towards the end groups get
smaller, so that all end together. What a lane gives back waits a little and then goes to whoever
asks first. 10,000 shards make some hundred groups.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from deepspec.config.retries import StageLimits

MAX_GROUPS = 500  # of a stage: each is a task run in the Prefect server's database, about 20 kB
SHORTEST_S = 60.0  # smaller groups at the end would spend their time on loading the target
SHARD_DIGITS = 4  # of shard numbers in names, so that they sort
# tries that a lane may fail as a whole, one after the other, before it is left out where there are
# others
IN_A_ROW = 3


@dataclass
class Lane:
    """Something that works on one group at a time: a GPU, a share of the CPU, a machine's
    worker.
    """

    name: str
    device: str | None = None
    shards: int = 0
    """Shards that it has made in this run."""
    busy_s: float = 0.0
    """Seconds that it took for them, what failed included."""
    failed: int = 0
    failed_in_a_row: int = 0
    doing: str = ""
    """The group under way."""
    began: float = 0.0
    """When it was given to the lane (time.monotonic)."""
    dead: bool = False

    @property
    def shards_per_s(self) -> float | None:
        return self.shards / self.busy_s if self.shards and self.busy_s else None

    def busy_until(self, now: float) -> float:
        """Seconds at work, what is under way included."""
        return self.busy_s + (now - self.began if self.doing else 0.0)


@dataclass
class _Shard:
    number: int
    tries: int = 0
    ready_at: float = 0.0
    lane: Lane | None = None
    """Who has it."""


@dataclass
class ShardScheduler:
    """The shards that are still to be given to a lane, and those that are out.

    Args:
        shards: What is missing, in order.
        most: Shards in a group at most.
        group_s: Seconds that a group should last.
        limits: How often, and after what pause, a shard is given out again.
    """

    shards: Sequence[int]
    most: int
    group_s: float
    limits: StageLimits
    lanes: list[Lane] = field(default_factory=list)
    stopped: bool = False
    retried: int = 0
    """Times that a shard was given out again."""

    def __post_init__(self) -> None:
        self._left = [_Shard(shard) for shard in self.shards]
        self._out: dict[int, _Shard] = {}
        self._changed = threading.Condition()
        self._least = -(-len(self.shards) // MAX_GROUPS)

    def next_group(self, lane: Lane) -> list[int]:
        """The lane's next group; waits while there may be something later. Empty: there is
        nothing more for this lane.
        """
        with self._changed:
            while not (self.stopped or lane.dead):
                now = time.monotonic()
                if ready := [shard for shard in self._left if shard.ready_at <= now]:
                    return self._assign(lane, ready[: self._size(lane, len(ready))])
                if not (self._left or self._out):
                    break
                self._changed.wait(
                    min([shard.ready_at - now for shard in self._left], default=None)
                )
            return []

    def group_ended(self, lane: Lane, group: Sequence[int], made: int, seconds: float) -> None:
        """The lane has `made` so many shards of its group, and does not come back to the others."""
        with self._changed:
            lane.shards, lane.busy_s = lane.shards + made, lane.busy_s + seconds
            self._withdraw(lane, group)
            self._changed.notify_all()

    def give_back(self, lane: Lane, shards: Sequence[int], *, count: bool = True) -> list[int]:
        """Shards that another try may make go to whoever asks first; returns those that were tried
        too often for that.

        The try is not to `count` where the lane was to blame, or where it got on with its group.
        """
        spent = []
        with self._changed:
            for shard in self._withdraw(lane, shards):
                shard.tries += count
                if shard.tries > self.limits.retries:
                    spent.append(shard.number)
                else:
                    shard.ready_at = time.monotonic() + self.limits.delay_s(shard.tries)
                    self._left.append(shard)
                    self.retried += count
            self._left.sort(key=lambda shard: shard.number)
            self._changed.notify_all()
        return spent

    def lane_failed(self, lane: Lane, *, made: int = 0) -> bool:
        """The lane failed as a whole, having `made` so many shards of its group before.

        Returns whether it is left out from now on, because others live and it does nothing else
        than fail.
        """
        with self._changed:
            lane.failed, lane.failed_in_a_row = (
                lane.failed + 1,
                0 if made else lane.failed_in_a_row + 1,
            )
            lane.dead = lane.failed_in_a_row >= IN_A_ROW and any(
                not other.dead for other in self.lanes if other is not lane
            )
            return lane.dead

    def close(self) -> None:
        """Nothing more is dealt; what is under way is finished."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()

    def _assign(self, lane: Lane, group: list[_Shard]) -> list[int]:
        for shard in group:
            self._left.remove(shard)
            self._out[shard.number], shard.lane = shard, lane
        return [shard.number for shard in group]

    def _withdraw(self, lane: Lane, shards: Sequence[int]) -> list[_Shard]:
        """Those that are not out at this lane any more stay where they are: another lane may
        have them.
        """
        return [
            self._out.pop(number)
            for number in shards
            if number in self._out and self._out[number].lane is lane
        ]

    def _size(self, lane: Lane, ready: int) -> int:
        """What lasts `group_s` at this lane, and no more than its share of what is left, unless
        that were over too soon.
        """
        alive = [other for other in self.lanes if not other.dead]
        known = [other.shards_per_s for other in alive if other.shards_per_s]
        speed = lane.shards_per_s
        if speed is None:
            return max(self._least, min(self.most, -(-ready // max(len(alive), 1))))
        others = sum(other.shards_per_s or sum(known) / len(known) for other in alive)
        share = ready * speed / others
        wished = min(speed * self.group_s, max(share, speed * SHORTEST_S))
        return max(self._least, min(self.most, int(wished + 0.5)), 1)
