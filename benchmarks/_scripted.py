"""An engine that costs nothing: what is left of a run is everything around the work. Imports no
torch, as every child loads it.
"""

from collections.abc import Iterator, Sequence

from deepspec.config.run import RunConfig
from deepspec.target.conversation import AnswerRequest, Outcome, Turn


class Free:
    """Answers with the user's message turned round, at once."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def answer(
        self, requests: Sequence[AnswerRequest], *, shard: int
    ) -> Iterator[tuple[AnswerRequest, Outcome]]:
        for request in requests:
            yield (
                request,
                Turn(request.messages[-1].content[::-1], None, "stop", 5, 3, request.seed),
            )
