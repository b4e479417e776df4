"""In a child process: attention of training for a chip, forward and backward, batch by batch.

The request names the `chip`, whether kernels are compiled to its machine code (`compiling`), and
`cases` of [heads, dtype, batches]; a batch is [blocks, block size, tokens, copies]. Prints for each
case its kernels, and what every batch added to them or the error that it raised.
"""

import json
import sys

from tests.gpu import pretence
from tests.gpu.chips import CHIPS

REQUEST = json.loads(sys.argv[3])
pretence.believe_in(CHIPS[REQUEST["chip"]])

import torch  # noqa: E402

from tests.gpu.batches import run_batch  # noqa: E402


def main() -> None:
    for heads, dtype, batches in REQUEST["cases"]:
        torch._dynamo.reset()
        found = []
        with pretence.fake_tensors(compiling=REQUEST["compiling"]) as kernels:
            for batch in batches:
                num_before, error = len(kernels), ""
                try:
                    run_batch(heads, getattr(torch, dtype), batch)
                except RuntimeError as failed:  # what torch's compiler and Triton raise
                    error = str(failed).strip().partition("\n")[0]
                found.append({"new": len(kernels) - num_before, "error": error})
        made = [{"name": each.name, "shared_memory": each.shared_memory} for each in kernels]
        print(json.dumps({"kernels": made, "batches": found}), flush=True)


if __name__ == "__main__":
    main()
