"""In a child process: a draft's training compiled for a chip, both passes, batch by batch.

The request has the `chip`, the `target`'s config.json, a `recipe` for the draft, and `batches`, the
lengths of their samples. Prints whether training would compile there, then the kernels that each
batch added.
"""

import json
import sys

from tests.gpu import pretence
from tests.gpu.chips import CHIPS

REQUEST = json.loads(sys.argv[3])
pretence.believe_in(CHIPS[REQUEST["chip"]])

import torch  # noqa: E402
from torch._subclasses.fake_tensor import unset_fake_temporarily  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402

from deepspec.config.recipes import load_run  # noqa: E402
from deepspec.model.block_draft import BlockDraft  # noqa: E402
from deepspec.model.drafter import Drafter, TrainBatch  # noqa: E402
from deepspec.model.eagle3 import Eagle3Draft  # noqa: E402
from deepspec.model.execution import Execution, compiles  # noqa: E402
from deepspec.model.spec import DraftSpec  # noqa: E402


def train_on(draft: Drafter, lengths: list[int]) -> None:
    """Both passes over samples of these lengths, answers but for a third."""
    spec, num_tokens = draft.spec, sum(lengths)
    with unset_fake_temporarily():  # plans are made on the host
        batch = TrainBatch(
            input_ids=torch.zeros(num_tokens, dtype=torch.long),
            loss_mask=torch.cat([torch.arange(length) > length // 3 for length in lengths]),
            lengths=torch.tensor(lengths),
            context=torch.empty(0),
            last_hidden=torch.empty(0),
            seeds=tuple(range(len(lengths))),
        )
        plan = draft.plan(batch)
    context, last_hidden = (
        torch.randn(num_tokens, width, device="cuda", dtype=torch.bfloat16)
        for width in (spec.num_context_features, spec.hidden_size)
    )
    batch, plan = tree_map_only(torch.Tensor, lambda tensor: tensor.to("cuda"), (batch, plan))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        output = draft.loss(batch._replace(context=context, last_hidden=last_hidden), plan)
    output.numerator.backward()


def main() -> None:
    run = load_run(REQUEST["recipe"], REQUEST["overrides"], store=".")
    spec = DraftSpec.from_target(
        REQUEST["target"],
        run.draft,
        layer_ids=run.target.layer_ids,
        mask_token_id=run.target.mask_token_id,
    )
    with pretence.fake_tensors(compiling=False) as kernels:
        print(json.dumps(compiles(run, torch.device("cuda"))))
        with torch.device("cuda"):
            draft = (Eagle3Draft if spec.algorithm == "eagle3" else BlockDraft)(spec)
        for frozen in (draft.embed_tokens, draft.lm_head):  # as `hold_frozen`, for fake tensors
            frozen.weight = torch.nn.Parameter(frozen.weight.bfloat16(), requires_grad=False)
        draft.embedded_dtype = torch.float32
        draft.execution = Execution(compile=True)
        for lengths in REQUEST["batches"]:
            num_before = len(kernels)
            train_on(draft, lengths)
            print(json.dumps([kernel.name for kernel in kernels[num_before:]]), flush=True)


if __name__ == "__main__":
    main()
