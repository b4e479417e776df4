"""Attention of targets: what transformers computes, without a copy of keys or values; and
flash-attention only where it can work.
"""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from deepspec.config.data import SamplingConfig
from deepspec.target import attention, decoding_cache
from deepspec.target.generate import Decode, generate, pad_right
from deepspec.target.model import Target
from tests.target.tiny_target import CONFIG

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
ROWS = [list(range(1, 41)), list(range(20, 51)), list(range(60, 77))]
LAYERS = (-1, 0, 2)


def qwen3(kv_heads: int = 2) -> Any:
    torch.manual_seed(3)
    heads = {"num_attention_heads": 8, "num_key_value_heads": kv_heads}
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, **heads))


def gemma4() -> Any:
    """Sliding layers of 4 key-value heads, global ones of a single wider one."""
    torch.manual_seed(3)
    config = Gemma4TextConfig(
        **SIZES,
        num_attention_heads=8,
        num_key_value_heads=4,
        global_head_dim=32,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=97,
    )
    return Gemma4ForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "8 heads, 2 key-value heads": qwen3,
    "8 heads, 8 key-value heads": lambda: qwen3(8),
    "sliding and global layers": gemma4,
}


def states(target: Target, num_new: int) -> list[Tensor]:
    """Of rows without a cache, then of tokens that continue rows of different lengths."""
    uncached = target.forward(pad_right(ROWS, target.device))
    cache = target.new_cache(len(ROWS), 200)
    target.forward(pad_right(ROWS, target.device), cache)
    cache.lengths = [len(row) for row in ROWS]
    new = torch.arange(num_new).remainder(90).expand(len(ROWS), -1)
    return [*uncached, *target.forward(new, cache)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_new", [1, 8, attention.FEW_QUERIES + 1])
def test_states_are_those_of_transformers_own_attention(name: str, num_new: int, monkeypatch):
    ours = Target(MODELS[name](), LAYERS)
    found = states(ours, num_new)
    monkeypatch.setattr(decoding_cache, "KeyMask", lambda visible, **_: visible)
    AttentionInterface.register("sdpa_theirs", sdpa_attention_forward)
    make_mask = partial(attention.make_mask, uncached=sdpa_mask)
    AttentionMaskInterface.register("sdpa_theirs", make_mask)
    ours.decoder.set_attn_implementation("sdpa_theirs")
    for mine, theirs in zip(found, states(ours, num_new), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_kernels_that_cannot_share_keys_take_a_head_of_each_group_at_a_time(name, monkeypatch):
    """On a GPU, wide heads and float32: PyTorch's plain formula would hold all scores."""
    target = Target(MODELS[name](), LAYERS)
    ids = pad_right(ROWS, target.device)
    wanted = target.forward(ids)
    monkeypatch.setattr(attention, "_kernel_groups", lambda _: False)
    for mine, theirs in zip(target.forward(ids), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "device", "groups"),
    [
        (128, torch.bfloat16, "cuda", True),
        (256, torch.bfloat16, "cuda", True),
        (512, torch.bfloat16, "cuda", False),
        (128, torch.float32, "cuda", False),
        (512, torch.float32, "cpu", True),
    ],
)
def test_the_kernel_groups_heads_only_where_flash_attention_takes_them(
    head_dim, dtype, device, groups
):
    with FakeTensorMode():
        query = torch.empty(1, 8, 4, head_dim, dtype=dtype, device=device)
        assert attention._kernel_groups(query) is groups


class LargestMade(TorchDispatchMode):
    """Elements of the largest tensor that was newly made, not a view of another."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if is_tensor(t)]
        new = [t.numel() for t in made if t.untyped_storage()._cdata not in given]
        self.elements = max([self.elements, *new])
        return out


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


@pytest.mark.parametrize("num_new", [1, 8, attention.FEW_QUERIES + 1])
def test_no_key_or_value_of_a_cache_is_copied(num_new: int, monkeypatch):
    """transformers repeats them for the heads that share them wherever a mask is given: a copy of
    the cache, four times its size for Qwen3-8B, in every layer of every round.
    """
    target = Target(qwen3(), LAYERS)
    layer = target.decoder.layers[0].self_attn
    rows, num_keys = 3, 4000
    keys = torch.randn(rows, 2, num_keys + 100, 16)[:, :, :num_keys]
    query = torch.randn(rows, num_new, 8, 16).transpose(1, 2)
    visible = torch.ones(1, 1, num_new, num_keys, dtype=torch.bool)
    mask = attention.KeyMask(visible)
    mask.bias(4, torch.float32), mask.bias(1, torch.float32)  # made once for all layers

    def largest(function: Callable[..., Any], given: Any) -> int:
        with torch.inference_mode(), LargestMade() as made:
            function(layer, query, keys, keys, given, scaling=0.25)
        return made.elements

    assert largest(attention.grouped_attention, mask) <= query.numel()
    if num_new > 1:  # where the counting itself would show the copy
        assert largest(sdpa_attention_forward, visible) >= 4 * keys.numel()


def test_a_mask_is_made_once_for_all_layers_of_a_kind():
    target = Target(gemma4(), LAYERS)
    cache = target.new_cache(len(ROWS), 64)
    made: list[tuple[int, ...]] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func._schema.name == "aten::masked_fill_":
                made.append(tuple(out.shape))
            return out

    target.forward(pad_right(ROWS, target.device), cache)
    cache.lengths = [len(row) for row in ROWS]
    with Counting():
        target.forward(torch.ones(3, 4, dtype=torch.long), cache)
    # a sliding layer's heads share keys in pairs, those of a global one all of them
    assert sorted(shape[2] for shape in made) == [2 * 4, 8 * 4]


def test_rows_of_a_bias_are_aligned_and_hide_what_is_not_visible():
    visible = torch.ones(2, 1, 3, 21, dtype=torch.bool).tril(18)
    bias = attention.KeyMask(visible).bias(2, torch.bfloat16)
    assert bias.shape == (2, 1, 6, 21)
    assert all(stride % attention.ALIGNMENT == 0 for stride in bias.stride()[:-1])
    assert torch.equal(bias == 0, visible.repeat(1, 1, 2, 1))
    assert torch.equal(bias.isneginf(), ~visible.repeat(1, 1, 2, 1))


def test_greedy_answers_are_those_of_transformers_own_generation():
    target = Target(gemma4(), LAYERS)
    settings = Decode(SamplingConfig(temperature=0), 24, frozenset())
    found = generate(target, ROWS, settings, seeds=[0, 0, 0])
    reference = gemma4()
    reference.set_attn_implementation("eager")
    for prompt, answer in zip(ROWS, found, strict=True):
        ids = torch.tensor([prompt])
        wanted = reference.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)
        assert answer == wanted[0, len(prompt) :].tolist()


def install_flash_attention(folder: Path, body: str, monkeypatch) -> None:
    (folder / "flash_attn").mkdir()
    (folder / "flash_attn" / "__init__.py").write_text(body)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    importlib.invalidate_caches()


UNDEFINED = 'raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E")\n'
NO_KERNEL = """def flash_attn_func(*_, **__):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
"""
TOO_OLD = "__version__ = '0.1'\n"


@pytest.mark.parametrize(
    ("body", "reason"),
    [(UNDEFINED, "undefined symbol"), (NO_KERNEL, "no kernel image"), (TOO_OLD, "flash_attn_func")],
)
def test_a_flash_attention_that_does_not_work_is_reported_and_left_alone(
    body, reason, tmp_path, monkeypatch, caplog
):
    """Fault 4: built for another CUDA, it was found by its name and failed in the first batch."""
    install_flash_attention(tmp_path, body, monkeypatch)
    plain = Qwen3ForCausalLM(CONFIG)
    with FakeTensorMode():  # gives tensors on a GPU to a machine without one
        attention.use_flash_attention(plain.get_decoder(), torch.device("cuda"), torch.bfloat16)
    assert not Target(plain, LAYERS).packs
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert reason in record.getMessage()
    assert "padded" in record.getMessage()


def test_heads_wider_than_flash_attention_takes_keep_it_from_being_imported(
    tmp_path, monkeypatch, caplog
):
    """Gemma4's global layers have heads of 512; transformers does not object, the kernel does."""
    install_flash_attention(tmp_path, "raise SystemExit('imported')\n", monkeypatch)
    plain = gemma4()
    plain.get_decoder().layers[1].self_attn.head_dim = 512
    attention.use_flash_attention(plain.get_decoder(), torch.device("cuda"), torch.bfloat16)
    assert not Target(plain, LAYERS).packs
    assert "heads of 512 are wider than 256" in caplog.text


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_flash_attention_is_not_tried_where_it_never_serves(
    device, dtype, tmp_path, monkeypatch, caplog
):
    install_flash_attention(tmp_path, "raise SystemExit('imported')\n", monkeypatch)
    plain = Qwen3ForCausalLM(CONFIG)
    attention.use_flash_attention(plain.get_decoder(), torch.device(device), dtype)
    assert caplog.text == ""
