"""In a child process: which attention training takes on a GPU, kernels compiled as it would.

The request names the `chip`, the bytes of `shared_memory` that a block may have, `heads` and
`dtype`. Prints the path, what was logged, the probe's kernels, and those that a batch of training
added to them.
"""

import dataclasses
import json
import logging
import sys

from tests.gpu import pretence
from tests.gpu.chips import CHIPS

REQUEST = json.loads(sys.argv[3])
pretence.believe_in(CHIPS[REQUEST["chip"]]._replace(shared_memory=REQUEST["shared_memory"]))

import torch  # noqa: E402

from deepspec.config.families import HeadGeometry  # noqa: E402
from deepspec.model.attention_path import training_path  # noqa: E402
from tests.gpu.batches import run_batch  # noqa: E402
from tests.model.drafts import make_spec  # noqa: E402


def main() -> None:
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(f"{record.levelname} {record.getMessage()}")
    log = logging.getLogger("deepspec")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    heads = HeadGeometry(*REQUEST["heads"], values_are_keys=False)
    spec = dataclasses.replace(make_spec(), heads=heads)
    with pretence.fake_tensors(compiling=True) as kernels:
        weight = torch.ones(2, device="cuda", dtype=getattr(torch, REQUEST["dtype"]))
        paths = [training_path(weight, spec, block_size=7) for _ in range(2)]
        num_probed = len(kernels)
        if paths[0] == "flex":
            run_batch(REQUEST["heads"], weight.dtype, (600, 7, 1000, 1))
    names = [kernel.name for kernel in kernels]
    found = {"probed": names[:num_probed], "added": names[num_probed:]}
    print(json.dumps({"paths": paths, "logged": logged, **found}))


if __name__ == "__main__":
    main()
