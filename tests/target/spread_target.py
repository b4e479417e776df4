"""A target over two devices, run by test_device: a program, since a backend is for a whole process.

The devices are PyTorch's stand-ins for one written in Python; tensors on them are fake, they have
shapes and devices and no values, and computing with tensors of two devices raises. Layers are
spread by accelerate, as `from_pretrained` does it.
"""

import sys

import torch
from accelerate import dispatch_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import Qwen3ForCausalLM

from deepspec.target.model import Target
from tests.target.tiny_target import CONFIG

FIRST, SECOND = "other:0", "other:1"


def spread(head: str) -> Target:
    """The tiny target, two layers on each device and lm_head on `head`."""
    config = CONFIG.__class__(**CONFIG.to_dict() | {"tie_word_embeddings": False})
    model = Qwen3ForCausalLM(config)
    places = {f"model.layers.{layer}": (FIRST, SECOND)[layer // 2] for layer in range(4)}
    places |= {"model.embed_tokens": FIRST, "model.rotary_emb": FIRST}
    places |= {"model.norm": SECOND, "lm_head": head}
    for name, device in places.items():
        for module in model.get_submodule(name).modules():
            for key, weight in module.named_parameters(recurse=False):
                module.register_parameter(
                    key, nn.Parameter(torch.empty_like(weight, device=device))
                )
            for key, buffer in module.named_buffers(recurse=False):
                module.register_buffer(key, torch.empty_like(buffer, device=device))
    skipped = model._skip_keys_device_placement
    return Target(dispatch_model(model, places, force_hooks=True, skip_keys=skipped), (-1, 0, 2))


def decode(target: Target) -> None:
    """Prefill two rows of unequal length, decode two tokens of each, and once without a cache."""
    keys_and_values = 2 * CONFIG.num_key_value_heads * CONFIG.head_dim * 4
    assert target.row_bytes(16) == 16 * keys_and_values * 2, "two layers on each device"
    assert {weight.device for weight in target.frozen.values()} == {target.device}
    input_ids = torch.zeros(2, 5, dtype=torch.long, device=target.device)
    cache = target.new_cache(2, 16)
    outputs = [target.forward(input_ids), target.forward(input_ids, cache)]
    cache.lengths = [3, 5]
    outputs.append(target.forward(input_ids[:, :2], cache))
    for output in outputs:
        logits = target.logits(output.last_hidden)
        assert {each.device for each in (*output, logits)} == {target.device}


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend("other")
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) makes a fake one, too
    with FakeTensorMode(allow_non_fake_inputs=True):
        decode(spread(sys.argv[1]))
