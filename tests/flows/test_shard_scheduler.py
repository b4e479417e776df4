"""Groups follow the lanes' measured speed, what is given back is made by others, and a lane
that only fails is left out.
"""

import heapq
import threading

import pytest

from deepspec.config.retries import LONGEST_DELAY_S, StageLimits
from flows.shard_scheduler import IN_A_ROW, MAX_GROUPS, Lane, ShardScheduler

AT_ONCE = StageLimits(retries=2, retry_delay_s=0.0, deadline_s=None)


def scheduler_of(
    num_shards: int, lanes: list[Lane], *, most: int = 32, group_s: float = 600.0
) -> ShardScheduler:
    return ShardScheduler(range(num_shards), most, group_s, AT_ONCE, lanes)


def worked_off(
    scheduler: ShardScheduler, seconds_per_shard: list[float]
) -> tuple[list[tuple[str, int]], float]:
    """All groups (lane, size) in the order in which they were begun, and when the last one
    ended, on a clock of its own.
    """
    clock, groups = (
        [(0.0, number) for number in range(len(scheduler.lanes))],
        list[tuple[str, int]](),
    )
    ends = 0.0
    while clock:
        now, number = heapq.heappop(clock)
        lane = scheduler.lanes[number]
        with scheduler._changed:  # no other lane could give something back: it is not waited for
            scheduler._assigned.clear()
        if group := scheduler.next_group(lane):
            took = len(group) * seconds_per_shard[number]
            scheduler.group_ended(lane, group, len(group), took)
            groups.append((lane.name, len(group)))
            heapq.heappush(clock, (now + took, number))
            ends = max(ends, now + took)
    return groups, ends


def test_a_faster_lane_gets_more_and_all_end_together():
    lanes = [Lane("fast"), Lane("slow")]
    groups, ends = worked_off(scheduler_of(1000, lanes), [10.0, 40.0])
    ideal = 1000 / (1 / 10 + 1 / 40)
    assert ends < 1.05 * ideal
    assert sum(size for name, size in groups if name == "fast") == pytest.approx(800, rel=0.05)
    assert sum(size for _, size in groups) == 1000


def test_groups_last_minutes_and_never_exceed_what_is_allowed():
    # 600 s wished: ten shards of a minute
    groups, _ = worked_off(scheduler_of(2000, [Lane("lane")]), [60.0])
    assert {size for _, size in groups[1:-5]} == {10}
    groups, _ = worked_off(scheduler_of(2000, [Lane("lane")]), [0.1])
    assert {size for _, size in groups[:-5]} == {32}


def test_a_stage_of_ten_thousand_slow_shards_does_not_become_ten_thousand_task_runs():
    groups, _ = worked_off(
        scheduler_of(10_000, [Lane(str(number)) for number in range(8)], group_s=60.0), [300.0] * 8
    )
    assert len(groups) <= MAX_GROUPS + 1


def test_what_a_lane_gives_back_another_one_makes_that_waits_for_it():
    lanes = [Lane("dies"), Lane("lives")]
    scheduler = scheduler_of(2, lanes, most=1)
    first, second = scheduler.next_group(lanes[0]), scheduler.next_group(lanes[1])
    scheduler.group_ended(lanes[1], second, 1, 1.0)
    taken: list[list[int]] = []
    waiting = threading.Thread(target=lambda: taken.append(scheduler.next_group(lanes[1])))
    waiting.start()
    assert scheduler.give_back(lanes[0], first) == []
    scheduler.group_ended(lanes[0], first, 0, 1.0)
    waiting.join(10)
    assert taken == [first]
    scheduler.group_ended(lanes[1], first, 1, 1.0)
    assert scheduler.next_group(lanes[1]) == []


def test_a_shard_is_given_out_again_as_often_as_is_allowed():
    lane = Lane("lane")
    scheduler = scheduler_of(2, [lane], most=1)
    for spent in ([], [], [0]):
        group = scheduler.next_group(lane)
        assert group == [0] and scheduler.give_back(lane, group) == spent
        scheduler.group_ended(lane, group, 0, 1.0)
    assert scheduler.next_group(lane) == [1]


def test_a_lane_that_only_fails_is_left_out_and_the_last_one_never():
    lanes = [Lane("sick"), Lane("well")]
    scheduler = scheduler_of(100, lanes)
    for number in range(IN_A_ROW):
        assert scheduler.lane_failed(lanes[0]) == (number == IN_A_ROW - 1)
    assert scheduler.next_group(lanes[0]) == [] and scheduler.next_group(lanes[1]) != []
    assert not any(scheduler.lane_failed(lanes[1]) for _ in range(IN_A_ROW))


def test_where_the_stage_ends_nobody_waits_any_longer():
    lanes = [Lane("busy"), Lane("waiting")]
    scheduler = scheduler_of(1, lanes)
    assert scheduler.next_group(lanes[0]) == [0]
    waiting = threading.Thread(target=scheduler.next_group, args=(lanes[1],))
    waiting.start()
    scheduler.close()
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_lane_that_gets_on_between_its_failures_is_not_left_out():
    """Workers that are killed every minute made some of each group: one after the other, all
    lanes but one were left out for good.
    """
    lanes = [Lane("killed"), Lane("well")]
    scheduler = scheduler_of(100, lanes)
    assert not any(scheduler.lane_failed(lanes[0], made=2) for _ in range(3 * IN_A_ROW))
    assert [scheduler.lane_failed(lanes[0]) for _ in range(IN_A_ROW)] == [False, False, True]


def test_however_often_is_tried_again_there_is_a_pause():
    limits = StageLimits(retries=10_000, retry_delay_s=2.0, deadline_s=None)
    assert 0.5 * LONGEST_DELAY_S < limits.delay_s(9_999) < 1.5 * LONGEST_DELAY_S
