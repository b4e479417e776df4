"""A cache changes nothing, also after tokens are taken back."""

import torch

from deepspec.target.generate import pad_right
from deepspec.target.model import Target
from tests.target.tiny_target import PROMPTS


def test_a_cache_with_rows_taken_back_to_different_lengths_changes_nothing(target: Target):
    """Feed junk, take each row back to another length, go on: the states are those of the
    uncached sequence.
    """
    cache = target.new_cache(3, 40)
    target.forward(pad_right(PROMPTS, target.device), cache)
    cache.lengths = [len(prompt) for prompt in PROMPTS]
    target.forward(torch.full((3, 5), 90), cache)
    cache.lengths = [4, 3, 7]
    rest = [[50, 51, 52], [53, 54, 55], [56, 57, 58]]
    output = target.forward(torch.tensor(rest), cache)
    for row, (prompt, length) in enumerate(zip(PROMPTS, cache.lengths, strict=True)):
        alone = target.forward(torch.tensor([[*prompt[:length], *rest[row]]]))
        torch.testing.assert_close(
            output.context[row], alone.context[0, length:], atol=1e-5, rtol=1e-5
        )
