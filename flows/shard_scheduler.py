"""Assigns the missing shards of a stage to lanes, in groups that last minutes, to each lane as many
as its measured speed allows.

A lane takes its next group when it has finished one, so a fast lane takes more of them; towards the
end groups get smaller, so that all lanes end together. What a lane gives back is assigned again,
after a pause, to the first lane that is free. 10,000 shards make some hundred groups.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from deepspec.config.retries import StageLimits

MAX_GROUPS = 500  # of a stage: each is a task run in the Prefect server's database, about 20 kB
SHORTEST_S = 60.0  # smaller groups at the end would spend their time on loading the target
SHARD_DIGITS = 4  # of shard numbers in names, so that they sort
# groups that a lane may fail as a whole, one after the other, before it is left out, as long as
# there are other lanes
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
    """Seconds that it took for them, failed work included."""
    failed: int = 0
    failed_in_a_row: int = 0
    doing: str = ""
    """The group under way."""
    began: float = 0.0
    """When it was given to the lane (time.monotonic)."""
    dead: bool = False

    @property
    def shards_per_s(self) -> float | None:
        """Its measured speed; None before its first shard."""
        return self.shards / self.busy_s if self.shards and self.busy_s else None

    def busy_until(self, now: float) -> float:
        """Seconds at work, the group under way included."""
        return self.busy_s + (now - self.began if self.doing else 0.0)


@dataclass
class _Shard:
    number: int
    tries: int = 0
    ready_at: float = 0.0
    lane: Lane | None = None
    """The lane that it is assigned to."""


@dataclass
class ShardScheduler:
    """The shards that are not assigned yet, and those that lanes work on; for many threads.

    Args:
        shards: The missing shards, in order.
        most: Shards in a group at most.
        group_s: Seconds that a group should last.
        limits: How often, and after what pause, a shard is assigned again.
    """

    shards: Sequence[int]
    most: int
    group_s: float
    limits: StageLimits
    lanes: list[Lane] = field(default_factory=list)
    stopped: bool = False
    retried: int = 0
    """Times that a shard was assigned again."""

    def __post_init__(self) -> None:
        self._waiting = [_Shard(shard) for shard in self.shards]
        self._assigned: dict[int, _Shard] = {}
        self._changed = threading.Condition()
        self._least = -(-len(self.shards) // MAX_GROUPS)

    def next_group(self, lane: Lane) -> list[int]:
        """The lane's next group; waits while there may be one later. Empty: there is nothing more
        for this lane.
        """
        with self._changed:
            while not (self.stopped or lane.dead):
                now = time.monotonic()
                if ready := [shard for shard in self._waiting if shard.ready_at <= now]:
                    return self._assign(lane, ready[: self._group_size(lane, len(ready))])
                if not (self._waiting or self._assigned):
                    break
                pauses = [shard.ready_at - now for shard in self._waiting]
                self._changed.wait(min(pauses, default=None))
            return []

    def group_ended(self, lane: Lane, group: Sequence[int], made: int, seconds: float) -> None:
        """The lane has `made` so many shards of its group, and will not return to the others."""
        with self._changed:
            lane.shards += made
            lane.busy_s += seconds
            self._withdraw(lane, group)
            self._changed.notify_all()

    def give_back(self, lane: Lane, shards: Sequence[int], *, count: bool = True) -> list[int]:
        """Shards that another try may make wait for the next free lane; returns those that were
        tried too often for that.

        The try does not `count` where the lane was to blame, or where it got on with its group.
        """
        spent = []
        with self._changed:
            for shard in self._withdraw(lane, shards):
                shard.tries += count
                if shard.tries > self.limits.retries:
                    spent.append(shard.number)
                else:
                    shard.ready_at = time.monotonic() + self.limits.delay_s(shard.tries)
                    self._waiting.append(shard)
                    self.retried += count
            self._waiting.sort(key=lambda shard: shard.number)
            self._changed.notify_all()
        return spent

    def lane_failed(self, lane: Lane, *, made: int = 0) -> bool:
        """The lane failed as a whole, having `made` so many shards of its group before.

        Returns whether it is left out from now on, because it only fails and others are alive.
        """
        with self._changed:
            lane.failed += 1
            lane.failed_in_a_row = 0 if made else lane.failed_in_a_row + 1
            others_live = any(not other.dead for other in self.lanes if other is not lane)
            lane.dead = lane.failed_in_a_row >= IN_A_ROW and others_live
            return lane.dead

    def close(self) -> None:
        """Nothing more is assigned; what is under way is finished."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()

    def _assign(self, lane: Lane, group: list[_Shard]) -> list[int]:
        for shard in group:
            self._waiting.remove(shard)
            self._assigned[shard.number] = shard
            shard.lane = lane
        return [shard.number for shard in group]

    def _withdraw(self, lane: Lane, shards: Sequence[int]) -> list[_Shard]:
        """Takes the shards from the lane; those that it no longer has may be another lane's, and
        stay there.
        """
        return [
            self._assigned.pop(number)
            for number in shards
            if number in self._assigned and self._assigned[number].lane is lane
        ]

    def _group_size(self, lane: Lane, num_ready: int) -> int:
        """As many shards as last `group_s` on this lane, and no more than its share of what is
        left, unless that would be over too soon.
        """
        alive = [other for other in self.lanes if not other.dead]
        speed = lane.shards_per_s
        if speed is None:
            equal_share = -(-num_ready // max(len(alive), 1))
            return max(self._least, min(self.most, equal_share))
        known = [other.shards_per_s for other in alive if other.shards_per_s]
        average = sum(known) / len(known)
        all_lanes = sum(other.shards_per_s or average for other in alive)
        share = num_ready * speed / all_lanes
        wished = min(speed * self.group_s, max(share, speed * SHORTEST_S))
        return max(self._least, min(self.most, int(wished + 0.5)), 1)
