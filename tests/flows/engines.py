"""Engines for tests of whole runs: one that takes its time, one that answers next to nothing."""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from deepspec.errors import DataError
from deepspec.target.conversation import AnswerRequest, Outcome
from tests.engines import Echo


class Slow(Echo):
    """Answers shard 0 at once and then sleeps for as long as the file FLAKY_DIR/slow is there."""

    def answer(
        self, requests: Sequence[AnswerRequest], *, shard: int
    ) -> Iterator[tuple[AnswerRequest, Outcome]]:
        while shard and (Path(os.environ["FLAKY_DIR"]) / "slow").exists():
            time.sleep(0.1)
        return super().answer(requests, shard=shard)


class Hopeless(Echo):
    """Answers shard 0, and fails every other one for good."""

    def answer(
        self, requests: Sequence[AnswerRequest], *, shard: int
    ) -> Iterator[tuple[AnswerRequest, Outcome]]:
        with (Path(os.environ["FLAKY_DIR"]) / "calls").open("a") as calls:
            calls.write(f"{shard}\n")
        if shard:
            raise DataError(
                "the prompt cannot be rendered", where=f"shard {shard}", fix="correct the prompt"
            )
        return super().answer(requests, shard=shard)


class Gated(Echo):
    """Answers every third shard at once and the others once the file FLAKY_DIR/slow is gone.

    FLAKY_DIR/waits has a line for each shard that it waited with, FLAKY_DIR/calls one for each that
    it went on to answer.
    """

    def answer(
        self, requests: Sequence[AnswerRequest], *, shard: int
    ) -> Iterator[tuple[AnswerRequest, Outcome]]:
        folder = Path(os.environ["FLAKY_DIR"])
        if shard % 3 and (folder / "slow").exists():
            with (folder / "waits").open("a") as waits:
                waits.write(f"{shard}\n")
            while (folder / "slow").exists():
                time.sleep(0.1)
        with (folder / "calls").open("a") as calls:
            calls.write(f"{shard}\n")
        return super().answer(requests, shard=shard)


class Waiting(Echo):
    """Answers shards 0 and 1 and then waits for as long as the file FLAKY_DIR/slow is there; fails
    shard 5 while FLAKY_DIR/broken is.

    Every call is noted in FLAKY_DIR/calls.
    """

    def answer(
        self, requests: Sequence[AnswerRequest], *, shard: int
    ) -> Iterator[tuple[AnswerRequest, Outcome]]:
        notes = Path(os.environ["FLAKY_DIR"])
        with (notes / "calls").open("a") as calls:
            calls.write(f"{shard}\n")
        while shard > 1 and (notes / "slow").exists():
            time.sleep(0.05)
        if shard == 5 and (notes / "broken").exists():
            raise DataError(
                "the prompt cannot be rendered", where=f"shard {shard}", fix="correct the prompt"
            )
        return super().answer(requests, shard=shard)


class Paced(Echo):
    """Answers a shard after FLAKY_DIR/pace seconds, at once where there is no such file."""

    def answer(
        self, requests: Sequence[AnswerRequest], *, shard: int
    ) -> Iterator[tuple[AnswerRequest, Outcome]]:
        pace = Path(os.environ["FLAKY_DIR"], "pace")
        if pace.exists():
            time.sleep(float(pace.read_text()))
        return super().answer(requests, shard=shard)
