"""What the Prefect UI shows of a stage at work: its progress in lines, its lanes as a table, and
pictures.
"""

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.filesize import decimal

from deepspec.figures.curves import Made, throughput, training
from deepspec.figures.drawing import data_url
from deepspec.process.events import progress_texts
from deepspec.process.progress_display import Progress
from flows.live import Content, table_content
from flows.shard_scheduler import Lane

UNCOUNTED = ("left_s", "rejected", "retries", "failed")  # shown in a line of their own


def progress_content(progress: Progress, url: str) -> Content:
    """The share that is done, and everything that is counted."""
    lines = "\n".join(f"* {line}" for line in progress_lines(progress))
    percent = 100.0 * progress.done / max(progress.total, 1)
    return Content(percent, f"{progress.stage}: {url}\n\n{lines}")


def progress_lines(progress: Progress) -> list[str]:
    """How far a stage is, in lines."""
    numbers = progress.numbers
    first: str = progress.state
    if progress.total:
        first += f": {progress.done:,} of {progress.total:,} {progress.unit}".rstrip()
    if numbers.get("left_s"):
        first += f", {timedelta(seconds=numbers['left_s'])} left"
    lines = [first]
    if "rows_per_s" in numbers:
        lines.append(f"{numbers['rows']:,} rows, {numbers['rows_per_s']:,.1f} rows/s")
        lines.append(f"{numbers['tokens']:,} tokens, {numbers['tokens_per_s']:,.0f} tokens/s")
        lines.append(f"{decimal(int(numbers['num_bytes']))} written")
    else:
        counted = {name: value for name, value in numbers.items() if name not in UNCOUNTED}
        lines.append(", ".join(progress_texts(counted)))
    trouble = {"retries": "retries", "rejected": "rejected rows", "failed": "failed shards"}
    lines.append(", ".join(f"{numbers.get(name, 0):,} {text}" for name, text in trouble.items()))
    return [line for line in (*lines, progress.note) if line]


def lane_table(
    stage: str, lanes: Sequence[Lane], shards: Mapping[str, int], began: float
) -> Content:
    """A row for each lane of a stage that began then (time.monotonic).

    `shards` are those that were committed by each lane, by its name: a lane itself counts them only
    once its group has ended.
    """
    now = time.monotonic()
    rows = [lane_row(lane, max(lane.shards, shards[lane.name]), now, now - began) for lane in lanes]
    return table_content(rows, f"{stage}: lanes")


def lane_row(lane: Lane, shards: int, now: float, seconds: float) -> dict[str, str]:
    """What one lane does, so many seconds after the stage began."""
    busy_s = lane.busy_until(now)
    return {
        "lane": lane.name,
        "device": lane.device or "",
        "doing": lane.doing,
        "shards": f"{shards:,}",
        "shards/min": f"{60 * shards / busy_s:.1f}" if busy_s else "",
        "busy": f"{min(busy_s / max(seconds, 1e-3), 1.0):.0%}",
        "failures": f"{lane.failed:,}",
        "dead": "dead" if lane.dead else "",
    }


def throughput_picture(stage: str, made: Sequence[Made], seconds: float) -> Content | None:
    """The shards made over the stage's time; None before the first one."""
    if not made:
        return None
    return _pictures(stage, [throughput(stage, made, seconds)], "throughput")


def training_pictures(
    lines: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]
) -> Content | None:
    """The curves of a training: its logged lines, and the steps that it reported since."""
    last = max((line["step"] for line in lines if "loss" in line), default=-1)
    pictures = training([*lines, *(step for step in steps if step["step"] > last)])
    return _pictures("train", pictures, "loss and acceptance") if pictures else None


def _pictures(stage: str, pictures: Sequence[str], title: str) -> Content:
    shown = "\n\n".join(f"![{stage}]({data_url(picture)})" for picture in pictures)
    return Content(shown, f"{stage}: {title}")
