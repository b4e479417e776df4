"""What a serving engine counts of a draft: its `/metrics`, read before and after prompts.

vLLM counts what a round accepted before it looks for stop tokens: rounds are those of the decoding
here, accepted tokens may be more by what followed a stop token in the round that drew it.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

DRAFTS = "vllm:spec_decode_num_drafts_total"
DRAFT_TOKENS = "vllm:spec_decode_num_draft_tokens_total"
BY_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
OF_DRAFT = (DRAFTS, DRAFT_TOKENS, BY_POSITION)
REQUESTS = "vllm:request_success_total"  # those that have ended, for whatever reason


class Rounds(NamedTuple):
    """Rounds of some prompts in no order: what each proposed, and what it accepted."""

    proposed: list[int]
    accepted: list[int]

    def committed(self, num_tokens: Sequence[int], *, stopped: bool) -> list[int]:
        """Tokens that each round added to answers of these lengths, the bonus token included.

        Where a stop token ended each of them (`stopped`), what the engine counted beyond it is
        taken off. The first token of an answer belongs to no round.
        """
        committed = [accepted + 1 for accepted in self.accepted]
        beyond = sum(committed) - sum(num_tokens) + len(num_tokens)
        for place, added in enumerate(committed):
            off = max(0, min(beyond, added - 1)) if stopped else 0
            committed[place] -= off
            beyond -= off
        return committed


class EngineCounts(NamedTuple):
    """Counters of one server since it was started, or what was added to them."""

    requests: int
    drafts: int
    draft_tokens: int
    accepted_at: tuple[int, ...]  # [K] rounds that accepted at least so many tokens, from 1 on

    def since(self, before: "EngineCounts") -> "EngineCounts":
        """What was added; below 0 where the server was started again in between."""
        pairs = zip(self.accepted_at, before.accepted_at, strict=True)
        return EngineCounts(
            self.requests - before.requests,
            self.drafts - before.drafts,
            self.draft_tokens - before.draft_tokens,
            tuple(now - then for now, then in pairs),
        )

    def rounds(self) -> Rounds:
        """The rounds that these counts are the sums of, those that accepted most first."""
        at_least = [self.drafts, *self.accepted_at, 0]
        accepted = [
            tokens
            for tokens in range(len(self.accepted_at), -1, -1)
            for _ in range(at_least[tokens] - at_least[tokens + 1])
        ]
        each, more = divmod(self.draft_tokens, max(self.drafts, 1))
        proposed = [each + (place < more) for place in range(self.drafts)]
        return Rounds(proposed, accepted)


def read_counts(metrics: str) -> tuple[EngineCounts, list[str]]:
    """The counters in a server's `/metrics`, over all of its engines, and those it does not have.

    Raises:
        ValueError: the text is not in Prometheus' format.
    """
    totals, at = defaultdict[str, float](float), defaultdict[int, float](float)
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            totals[sample.name] += sample.value
            if sample.name == BY_POSITION:
                at[int(sample.labels["position"])] += sample.value
    missing = [name for name in (REQUESTS, *OF_DRAFT) if name not in totals]
    counts = EngineCounts(
        int(totals[REQUESTS]),
        int(totals[DRAFTS]),
        int(totals[DRAFT_TOKENS]),
        tuple(int(at[position]) for position in sorted(at)),
    )
    return counts, missing
