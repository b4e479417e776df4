"""Engines for tests: answers without a model."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from deepspec.config.run import RunConfig
from deepspec.errors import DataError, TransientError
from deepspec.target.conversation import AnswerRequest, Outcome, Refused, Turn


class Echo:
    """Answers with the user's message turned round; refuses the word `refuse`."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def answer(
        self, requests: Sequence[AnswerRequest], *, shard: int
    ) -> Iterator[tuple[AnswerRequest, Outcome]]:
        for request in requests:
            yield request, self._one(request)

    def _one(self, request: AnswerRequest) -> Outcome:
        text = request.messages[-1].content
        if "refuse" in text:
            return Refused("refused", "the test refuses it")
        if "truncate" in text and len(text) > request.max_new_tokens:
            return Turn(
                text[::-1][: request.max_new_tokens],
                None,
                "length",
                request.max_new_tokens,
                3,
                request.seed,
            )
        return Turn(text[::-1][:40], None, "stop", 5, 3, request.seed)


class Flaky(Echo):
    """Fails shard 3 the first time as transient, shard 5 for good while the file FLAKY_DIR/broken
    is there.

    Every call is noted in FLAKY_DIR/calls, so that a test can see which shards were worked on.
    """

    def answer(
        self, requests: Sequence[AnswerRequest], *, shard: int
    ) -> Iterator[tuple[AnswerRequest, Outcome]]:
        notes = Path(os.environ["FLAKY_DIR"])
        with (notes / "calls").open("a") as calls:
            calls.write(f"{shard}\n")
        if shard == 3 and not (notes / "failed-once").exists():
            (notes / "failed-once").touch()
            raise TransientError(
                "the server is busy", where=f"shard {shard}", fix="it is tried again by itself"
            )
        if shard == 5 and (notes / "broken").exists():
            raise DataError(
                "the prompt cannot be rendered", where=f"shard {shard}", fix="correct the prompt"
            )
        return super().answer(requests, shard=shard)
