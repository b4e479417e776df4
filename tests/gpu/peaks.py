"""In a child process: peak bytes on a GPU of the product's own passes, at real sizes.

Tensors are fake: they have sizes and a device, and no memory. A storage counts from its first
tensor to its last. Prints a JSON line for each of the request's `cases`: a function of this module
and its arguments.
"""

import json
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.gpu import pretence
from tests.gpu.chips import CHIPS

REQUEST = json.loads(sys.argv[3])
pretence.believe_in(CHIPS["sm_90"])

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402
from transformers.initialization import no_init_weights  # noqa: E402

from deepspec.config.recipes import load_run  # noqa: E402
from deepspec.model.checkpoint import empty_draft  # noqa: E402
from deepspec.model.drafter import Drafter, TrainBatch  # noqa: E402
from deepspec.model.execution import Execution  # noqa: E402
from deepspec.model.spec import DraftSpec  # noqa: E402
from deepspec.target.loading import DTYPES  # noqa: E402
from deepspec.target.model import Target  # noqa: E402
from deepspec.train.strategy import loss_computed_in, trainable  # noqa: E402
from tests.gpu.stand_ins import take_the_place_of_kernels  # noqa: E402
from tests.target.recipe_targets import TARGETS  # noqa: E402

CUDA = torch.device("cuda")


class Bytes:
    """Of all storages on the GPU; those that a compiler only traces with do not count."""

    def __init__(self) -> None:
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type == "cuda" and storage._cdata not in self.live:
            self.live[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self.now -= self.live.pop(key)


@contextmanager
def counted() -> Iterator[Bytes]:
    """Within it tensors on "cuda" are fake, and counted as they are made."""
    counter, compute, depth = Bytes(), FakeTensorMode.__torch_dispatch__, 0

    def computed(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        nonlocal depth
        depth += 1  # a kernel is one, though fake tensors find its sizes by simpler ones
        try:
            out = compute(self, func, types, args, kwargs)
        finally:
            depth -= 1
        if depth == 0 and torch._guards.TracingContext.try_get() is None:
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    counter.add(tensor)
        return out

    FakeTensorMode.__torch_dispatch__ = computed
    try:
        with pretence.fake_tensors(compiling=False):
            yield counter
    finally:
        FakeTensorMode.__torch_dispatch__ = compute


def packed(num_tokens: int, num_samples: int) -> TrainBatch:
    """Samples of one length, every token of which is supervised."""
    return TrainBatch(
        input_ids=torch.zeros(num_tokens, dtype=torch.long),
        loss_mask=torch.ones(num_tokens, dtype=torch.bool),
        lengths=torch.full((num_samples,), num_tokens // num_samples),
        context=torch.zeros(0),
        last_hidden=torch.zeros(0),
        seeds=tuple(range(num_samples)),
    )


def on_gpu(value: Any) -> Any:
    """The same, every tensor fake."""
    if isinstance(value, Tensor):
        return torch.empty_like(value, device=CUDA)
    return type(value)(*map(on_gpu, value)) if hasattr(value, "_fields") else value


def step(
    recipe: str,
    *,
    num_tokens: int,
    num_samples: int,
    dtype: str = "bfloat16",
    recompute: bool = False,
    compiled: bool = False,
) -> dict[str, int]:
    """A micro-batch of training, with the gradients of those before it and AdamW's state."""
    config = load_run(recipe, store="none")
    spec = DraftSpec.from_target(
        TARGETS[recipe.partition("-")[2]],
        config.draft,
        layer_ids=config.target.layer_ids,
        mask_token_id=config.target.mask_token_id,
    )
    host, execution = packed(num_tokens, num_samples), Execution(compiled, recompute)
    planner = empty_draft(spec)
    planner.execution = execution
    plan = planner.plan(host)
    width = spec.hidden_size
    states = {"dtype": torch.bfloat16, "device": CUDA}
    with counted() as counter:
        with CUDA:
            draft = type(planner)(spec).train()
        draft.execution = execution
        draft.configure_loss(config.loss)
        hold_frozen(draft, DTYPES[dtype])
        parameters = trainable(draft).values()
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        held = [torch.empty_like(parameter) for parameter in parameters for _ in range(2)]
        held += [torch.empty(num_tokens, width * (len(spec.target_layer_ids) + 1), **states)] * 2
        batch = on_gpu(host)._replace(
            context=torch.empty(num_tokens, spec.num_context_features, **states),
            last_hidden=torch.empty(num_tokens, width, **states),
        )
        plan = on_gpu(plan)
        for _ in range(2 if compiled else 1):  # what is compiled is traced at the first
            counter.peak = counter.now
            loss_computed_in(dtype, draft, batch, plan).numerator.backward()
    return {"peak": counter.peak, "slots": plan.counted.numel()}


def hold_frozen(draft: Drafter, dtype: torch.dtype) -> None:
    """As `Drafter.hold_frozen`, which replaces data in place: fake tensors refuse that."""
    draft.embedded_dtype = torch.float32
    for part in (draft.embed_tokens, draft.lm_head):
        part.weight = torch.nn.Parameter(part.weight.detach().to(dtype), requires_grad=False)


def target_pass(
    recipe: str, *, rows: int, num_tokens: int, new_tokens: int | None = None
) -> dict[str, int]:
    """A forward pass of the target: for capture, or that begins answers of `new_tokens`."""
    name = recipe.partition("-")[2]
    settings = load_run(recipe, store="none").target
    shape = dict(TARGETS[name])
    text = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with counted() as counter, no_init_weights():
        with CUDA:
            model = AutoModelForCausalLM.from_config(text, dtype=DTYPES[settings.dtype])
        model.tie_weights()
        target = Target(model, settings.layer_ids)
        weights = counter.peak = counter.now
        ids = torch.zeros(rows, num_tokens, dtype=torch.long, device=CUDA)
        cache = None
        if new_tokens is not None:
            cache = target.new_cache(rows, num_tokens + new_tokens)
            cache.counts = [num_tokens] * rows
        output = target.forward(ids, cache)
    del output
    return {"weights": weights, "peak": counter.peak}


def main() -> None:
    take_the_place_of_kernels()
    passes = {"step": step, "target_pass": target_pass}
    for name, recipe, settings in REQUEST["cases"]:
        print(json.dumps(passes[name](recipe, **settings)), flush=True)


if __name__ == "__main__":
    main()
