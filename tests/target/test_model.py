"""The target: hidden states are tapped where they are said to be, and a cache changes nothing."""

import torch

from deepspec.target.generate import pad_right
from deepspec.target.model import Target
from tests.target.tiny_target import PROMPTS, make_target


def test_layers_are_tapped_by_the_convention_of_hidden_states(target: Target):
    """hidden_states[l + 1] of transformers is layer l; index 0 is the embedding output (trap
    C1).
    """
    ids = pad_right([PROMPTS[0]], target.device)
    states = target.model(input_ids=ids, output_hidden_states=True).hidden_states
    expected = torch.cat([states[layer + 1] for layer in target.layer_ids], dim=-1)
    assert torch.equal(target.forward(ids).context, expected)


def test_a_constant_added_behind_a_layer_is_read_back_there():
    marked = make_target(layer_ids=(0, 2))
    ids = pad_right([PROMPTS[0]], marked.device)
    before = marked.forward(ids).context
    marked.decoder.layers[2].mlp.down_proj.weight.mul_(3.0)
    after = marked.forward(ids).context
    assert torch.equal(before[..., :32], after[..., :32])
    assert not torch.equal(before[..., 32:], after[..., 32:])


def test_the_last_hidden_state_is_normed_once(target: Target):
    """lm_head of the tapped state gives the model's own logits (trap C2)."""
    ids = pad_right([PROMPTS[0]], target.device)
    assert torch.equal(
        target.logits(target.forward(ids).last_hidden), target.model(input_ids=ids).logits
    )


def test_a_row_in_a_padded_batch_has_the_states_it_has_alone(target: Target):
    batch = target.forward(pad_right(PROMPTS, target.device))
    for row, prompt in enumerate(PROMPTS):
        alone = target.forward(pad_right([prompt], target.device))
        torch.testing.assert_close(
            batch.context[row, : len(prompt)], alone.context[0], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            batch.last_hidden[row, : len(prompt)], alone.last_hidden[0], atol=1e-5, rtol=1e-5
        )


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
