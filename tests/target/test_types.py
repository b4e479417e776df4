"""Models of every type are targets: what is tapped, read and decoded is what they compute."""

from typing import Any

import pytest
import torch

from deepspec.config.data import SamplingConfig
from deepspec.target.attention import EAGER, GROUPED, own_attention
from deepspec.target.conformance import check_target, make_rows
from deepspec.target.examine import examine
from deepspec.target.generate import Decode, generate
from deepspec.target.model import Target
from tests.target.tiny_models import MODELS, SIZES, WINDOW, make_model

NEW_TOKENS = 12


def greedy_without_a_cache(model: Any, prompt: list[int]) -> list[int]:
    """The model's own tokens, each from a pass of its own over all tokens before it."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_a_target_computes_what_its_model_computes(name: str) -> None:
    """Each of these raised `'dict' object has no attribute 'ndim'` with a cache, or was wrong by a
    fifth (Gemma2, gpt-oss), but for Qwen3 and Gemma4.
    """
    target = Target(make_model(name), (-1, 0, 2))
    examine(target)
    assert target.cannot_decode == ""
    assert target.kernel == (EAGER if MODELS[name].eager else GROUPED)
    assert sum(window == WINDOW for window in target.windows) == MODELS[name].windows
    rows = make_rows(target)
    wrong = [check for check in check_target(target, rows) if not check.passed]
    assert wrong == []
    prompts = [row[: len(row) - 7 * number] for number, row in enumerate(rows)]
    settings = Decode(SamplingConfig(temperature=0), NEW_TOKENS, frozenset())
    answers = generate(target, prompts, settings, seeds=[0, 0, 0])
    with own_attention(target.decoder):
        assert answers == [greedy_without_a_cache(target.model, prompt) for prompt in prompts]


def test_every_answer_depends_on_what_the_type_adds() -> None:
    """The table's models are not plain ones by another name: without its sinks gpt-oss computes
    other states, and so does Gemma2 without its cap.
    """
    ids = torch.arange(3, 15)[None]
    for name, change in (
        ("gpt_oss", lambda layer: layer.self_attn.sinks.fill_(-50.0)),
        ("gemma2", lambda layer: setattr(layer.self_attn, "attn_logit_softcapping", None)),
    ):
        target = Target(make_model(name), (0, 2))
        before = target.forward(ids).last_hidden
        for layer in target.layers:
            change(layer)
        after = target.forward(ids).last_hidden
        assert (after - before).norm() > 0.05 * before.norm(), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3, images", "qwen3_vl"])
def test_parts_are_found_whatever_they_are_called(name: str) -> None:
    model = make_model(name)
    target = Target(model, (0, 2))
    assert len(target.layers) == SIZES["num_hidden_layers"]
    assert target.frozen["embed_tokens.weight"] is model.get_input_embeddings().weight
    assert target.frozen["lm_head.weight"].shape == (97, 32)
    vision = [name for name, _ in target.decoder.named_modules() if "vision" in name]
    assert vision == []


def test_a_list_of_as_many_experts_is_not_taken_for_the_layers() -> None:
    """Four layers, of which each has a list of four."""
    model = make_model("llama")
    for layer in model.model.layers:
        layer.mlp.experts = torch.nn.ModuleList(torch.nn.Identity() for _ in range(4))
    assert Target(model, (0, 2)).layers is model.model.layers
