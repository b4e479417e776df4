"""A target of four small layers, with random weights."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from deepspec.target.model import Target

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
