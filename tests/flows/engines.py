"""An engine that takes its time, for tests that interrupt a run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from deepspec.data.turns import Outcome, Request
from tests.engines import Echo


class Slow(Echo):
    """Answers shard 0 at once and then sleeps for as long as the file FLAKY_DIR/slow is there."""

    def answer(self, requests: Sequence[Request], *, shard: int) -> Iterator[tuple[Request, Outcome]]:
        while shard and (Path(os.environ["FLAKY_DIR"]) / "slow").exists():
            time.sleep(0.1)
        return super().answer(requests, shard=shard)
