"""In a child process: the loss over a vocabulary compiled for a chip.

The request has the `chip` and `cases` of [vocabulary, cap, Markov rank, terms, dtype, numbers of
slots]. Prints for each case the kernels that each number of slots added, with a gradient and then
without.
"""

import json
import sys
from collections.abc import Sequence

from tests.gpu import pretence
from tests.gpu.chips import CHIPS

REQUEST = json.loads(sys.argv[3])
pretence.believe_in(CHIPS[REQUEST["chip"]])

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import unset_fake_temporarily  # noqa: E402

from deepspec.model.chunked_loss import Coefficients, Vocabulary, score  # noqa: E402
from deepspec.model.targets import TargetPlaces, Targets  # noqa: E402

WIDTH, SLOTS_OF_PLACE = 2560, 4


def random(*shape: int, dtype: torch.dtype = torch.float32, learns: bool = False) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=learns)


def run(vocabulary: Vocabulary, terms: Sequence[str], dtype: torch.dtype, num_slots: int) -> None:
    num_places = -(-num_slots // SLOTS_OF_PLACE)
    with unset_fake_temporarily():
        found = TargetPlaces.of(torch.arange(num_slots) // SLOTS_OF_PLACE)
    tensors = (tensor.to("cuda") for tensor in found[:3])
    w2 = vocabulary.markov_w2
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        scores = score(
            random(num_slots, WIDTH, learns=True),
            None if w2 is None else random(num_slots, w2.shape[1], learns=True),
            vocabulary,
            Targets(random(num_places, WIDTH, dtype=dtype), TargetPlaces(*tensors, found[3])),
            labels=torch.zeros(num_slots, dtype=torch.long, device="cuda"),
            coefficients=Coefficients(**{term: random(num_slots) for term in terms}),
        )
    if scores.total.requires_grad:
        scores.total.backward()


def main() -> None:
    for size, cap, rank, terms, dtype_name, numbers in REQUEST["cases"]:
        torch._dynamo.reset()
        dtype, added = getattr(torch, dtype_name), []
        with pretence.fake_tensors(compiling=False) as kernels:
            w2 = random(size, rank, learns=True) if rank else None
            vocabulary = Vocabulary(random(size, WIDTH, dtype=dtype), w2, cap, compile=True)
            for learns in (True, False):
                for num_slots in numbers:
                    num_before = len(kernels)
                    with torch.set_grad_enabled(learns):
                        run(vocabulary, terms, dtype, num_slots)
                    added.append([kernel.name for kernel in kernels[num_before:]])
        print(json.dumps(added), flush=True)


if __name__ == "__main__":
    main()
