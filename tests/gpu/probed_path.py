"""In a child process: which attention training takes on a GPU, kernels compiled as it would.

The request names the `chip`, the bytes of `shared_memory` that a block may have, `heads` and
`dtype`. Prints the path and what was logged.
"""

import json
import logging
import sys

from tests.gpu import pretence
from tests.gpu.chips import CHIPS
from tests.gpu.harness import READY

REQUEST = json.loads(sys.argv[3])
pretence.believe_in(CHIPS[REQUEST["chip"]]._replace(shared_memory=REQUEST["shared_memory"]))

import torch  # noqa: E402

from deepspec.config.families import HeadGeometry  # noqa: E402
from deepspec.model.attention_path import training_path  # noqa: E402


def main() -> None:
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(f"{record.levelname} {record.getMessage()}")
    log = logging.getLogger("deepspec")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    heads = HeadGeometry(*REQUEST["heads"], values_are_keys=False)
    with pretence.fake_tensors(compiling=True) as kernels:
        weight = torch.ones(2, device="cuda", dtype=getattr(torch, REQUEST["dtype"]))
        print(READY, flush=True)
        paths = [training_path(weight, heads) for _ in range(2)]
    print(json.dumps({"paths": paths, "logged": logged, "kernels": [k.name for k in kernels]}))


if __name__ == "__main__":
    main()
