"""The target: hidden states are tapped where they are said to be, and a cache changes nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from deepspec.config.data import SamplingConfig
from deepspec.errors import ConfigError, DataError
from deepspec.target.generate import Decode, generate, pad_right
from deepspec.target.loading import load_target
from deepspec.target.model import Target
from tests.conftest import tiny_run

CONFIG = Qwen3Config(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17, 18, 19, 20, 21]]


def make_target(layer_ids: tuple[int, ...] = (-1, 0, 2)) -> Target:
    torch.manual_seed(3)
    return Target(Qwen3ForCausalLM(CONFIG), layer_ids)


@pytest.fixture(scope="module")
def target() -> Target:
    return make_target()


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


def test_greedy_answers_are_those_of_transformers(target: Target):
    settings = Decode(SamplingConfig(temperature=0), 12, {3})
    answers = generate(target, PROMPTS, settings, seeds=[0, 0, 0])
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = target.model.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=3,
            pad_token_id=0,
        )
        assert answer == expected[0, len(prompt) :].tolist()


def test_a_drawn_answer_depends_on_its_own_seed_and_not_on_its_batch(target: Target):
    settings = Decode(SamplingConfig(temperature=1.0, top_k=20), 12, {3})
    together = generate(target, PROMPTS, settings, seeds=[1, 2, 3])
    alone = [
        generate(target, [prompt], settings, seeds=[seed])[0]
        for prompt, seed in zip(PROMPTS, (1, 2, 3), strict=True)
    ]
    assert together == alone
    assert generate(target, PROMPTS, settings, seeds=[4, 5, 6]) != together


@pytest.mark.parametrize("layer", [3, 7])
def test_the_last_layer_and_layers_that_do_not_exist_are_refused(layer: int):
    with pytest.raises(ConfigError, match=str(layer)):
        make_target(layer_ids=(0, layer))


def test_a_model_that_is_not_there_is_refused_in_one_line(tmp_path):
    settings = tiny_run(tmp_path).target.model_copy(update={"model": str(tmp_path / "none")})
    with pytest.raises(DataError, match="cannot be loaded"):
        load_target(settings, folder=None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer_ids": (0, 3)}, "last layer"),
        ({"mask_token_id": 97}, "outside the target's vocabulary"),
    ],
)
def test_settings_that_the_target_does_not_fit_are_refused_before_its_weights_are_read(
    change, reason, tmp_path
):
    CONFIG.save_pretrained(tmp_path)  # a config and no weights at all
    fitting = {"model": str(tmp_path), "layer_ids": (0, 2), "mask_token_id": 96}
    settings = tiny_run(tmp_path).target.model_copy(update={**fitting, **change})
    with pytest.raises(ConfigError, match=reason):
        load_target(settings, folder=tmp_path)
