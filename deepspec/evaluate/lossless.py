"""Whether the output is the target's own: what the counts can show, and what they cannot."""

from deepspec.artifacts.results import Losslessness
from deepspec.evaluate.counts import Rows

GAP_BOUND = 0.5
"""bfloat16 keeps 8 bits: logits of 16 to 32 differ by steps of 0.125. Rounding may turn a near tie
of a few steps around."""


def losslessness(rows: Rows, temperature: float, dtype: str | None) -> Losslessness:
    """What is known of whether the output is the target's; `ok` is None where these counts cannot
    show it.
    """
    prompts = len(rows)
    identical = sum(bool(row["identical"]) for row in rows)
    gaps = [row["regret"] for row in rows if row.get("regret") is not None]
    largest = max(gaps, default=None)

    def known(words: str, *, ok: bool | None, bound: float | None = None) -> Losslessness:
        return Losslessness(
            dtype=dtype,
            identical=identical,
            prompts=prompts,
            max_logit_gap=largest,
            bound=bound,
            ok=ok,
            words=words,
        )

    if temperature > 0:
        why = "which verification ensures; two draws need not be equal"
        return known(f"sampled answers are distributed as the target's, {why}", ok=None)
    if identical == prompts:
        return known("every answer is token for token that of plain greedy decoding", ok=True)
    differ = f"{prompts - identical} of {prompts} answers differ from plain greedy decoding"
    if dtype == "float32":
        return known(f"{differ}: in float32 none may", ok=False, bound=0.0)
    if largest is None or len(gaps) < prompts - identical:
        why = "how near those ties were was not recorded"
        return known(f"{differ}, and {why}", ok=None, bound=GAP_BOUND)
    if largest > GAP_BOUND:
        why = f"by more than ties: logit gap {largest:.3g}"
        return known(f"{differ}, {why}", ok=False, bound=GAP_BOUND)
    why = f"by ties: no emitted token's logit is more than {largest:.3g} below the largest"
    return known(f"{differ}, {why} (bound {GAP_BOUND:g})", ok=True, bound=GAP_BOUND)
