"""In a child process: attention of training for a chip, forward and backward, batch by batch.

The request names the `chip`, whether kernels are compiled to its machine code (`compiling`), and
`cases` of [heads, dtype, batches]; a batch is [blocks, block size, tokens, copies]. Prints for each
case its kernels, and what every batch added to them or the error that it raised.
"""

import json
import sys
from collections.abc import Sequence

from tests.gpu import pretence
from tests.gpu.chips import CHIPS
from tests.gpu.harness import READY

REQUEST = json.loads(sys.argv[3])
pretence.believe_in(CHIPS[REQUEST["chip"]])

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from deepspec.model.attention import BlockVisibility, attend  # noqa: E402


def run(heads: Sequence[int], dtype: torch.dtype, batch: Sequence[int]) -> None:
    num_heads, num_kv_heads, head_dim = heads
    num_blocks, block_size, num_tokens, copies = batch
    num_slots = num_blocks * block_size

    def random(*shape: int) -> Tensor:
        return torch.randn(1, *shape, head_dim, device="cuda", dtype=dtype, requires_grad=True)

    context, *own = (
        (random(num_kv_heads, num), random(num_kv_heads, num))
        for num in (num_tokens, *[num_slots] * copies)
    )
    first = torch.zeros(num_blocks, dtype=torch.long, device="cuda")
    visibility = BlockVisibility(first, first + num_tokens, block_size, "flex")
    queries = random(num_slots, num_heads)
    attend(queries, context, own, visibility, scale=head_dim**-0.5).sum().backward()


def main() -> None:
    with pretence.fake_tensors(compiling=False) as kernels:
        torch.compile(torch.square)(torch.ones(2, device="cuda"))
    assert kernels
    print(READY, flush=True)
    for heads, dtype, batches in REQUEST["cases"]:
        torch._dynamo.reset()
        found = []
        with pretence.fake_tensors(compiling=REQUEST["compiling"]) as kernels:
            for batch in batches:
                num_before, error = len(kernels), ""
                try:
                    run(heads, getattr(torch, dtype), batch)
                except RuntimeError as failed:  # what torch's compiler and Triton raise
                    error = str(failed).strip().partition("\n")[0]
                found.append({"new": len(kernels) - num_before, "error": error})
        made = [{"name": each.name, "shared_memory": each.shared_memory} for each in kernels]
        print(json.dumps({"kernels": made, "batches": found}), flush=True)


if __name__ == "__main__":
    main()
