"""Shard numbers: as ranges that people write, and in groups."""

import re
from collections.abc import Iterable, Sequence

from deepspec.errors import ConfigError

SHARD_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
LAST_SHARD = 999_999  # a typing error must not become a list that fills the memory


def deal(shards: Sequence[int], size: int) -> list[list[int]]:
    """Consecutive groups of at most `size` shards."""
    return [list(shards[first : first + size]) for first in range(0, len(shards), size)]


def shard_list(shards: Iterable[int], digits: int = 1) -> str:
    """Shard numbers in few characters: `17,40-52`, or with leading zeros `0017,0040-0052`."""
    runs: list[list[int]] = []
    for shard in sorted(shards):
        if runs and shard == runs[-1][1] + 1:
            runs[-1][1] = shard
        else:
            runs.append([shard, shard])
    texts = [[f"{shard:0{digits}d}" for shard in dict.fromkeys(run)] for run in runs]
    return ",".join("-".join(text) for text in texts)


def parse_shards(text: str) -> list[int]:
    """`"17,18,40-52"` as shard numbers, ascending.

    Raises:
        ConfigError: a part is no number or range, or above `LAST_SHARD`.
    """
    shards: set[int] = set()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = SHARD_RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last > LAST_SHARD:
            what, fix = f"{part!r} is not a shard or a range of shards", "for example 17,18,40-52"
            raise ConfigError(what, where="--shards", fix=fix)
        shards.update(range(first, last + 1))
    return sorted(shards)
