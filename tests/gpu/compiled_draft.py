"""In a child process: a draft's backbone compiled for a chip, forward and backward, batch by batch.

The request has the `chip`, the `target`'s config.json, a `recipe` for the draft, and `batches` of
[tokens, blocks]. Prints the kernels that every batch added.
"""

import json
import sys

from tests.gpu import pretence
from tests.gpu.chips import CHIPS

REQUEST = json.loads(sys.argv[3])
pretence.believe_in(CHIPS[REQUEST["chip"]])

import torch  # noqa: E402

from deepspec.config.recipes import load_run  # noqa: E402
from deepspec.model.anchors import BlockPlan, Samples  # noqa: E402
from deepspec.model.block_draft import BlockDraft  # noqa: E402
from deepspec.model.execution import Execution  # noqa: E402
from deepspec.model.spec import DraftSpec  # noqa: E402


def states_of(draft: BlockDraft, num_tokens: int, num_blocks: int) -> torch.Tensor:
    """The backbone's output for blocks that all see one sample."""
    first = torch.zeros(num_blocks, dtype=torch.long, device="cuda")
    slots = first[:, None].expand(-1, draft.block_size)
    plan = BlockPlan(
        anchors=first + 1,
        samples=Samples(first, first + num_tokens),
        positions=torch.arange(num_tokens, device="cuda"),
        anchor_tokens=first,
        labels=slots,
        counted=slots == 0,
        weights=slots.float(),
    )
    context = torch.randn(num_tokens, draft.fc.in_features, device="cuda", dtype=torch.bfloat16)
    return draft.block_states(context, plan)


def main() -> None:
    run = load_run(REQUEST["recipe"], ["draft.num_layers=2"], store=".")
    spec = DraftSpec.from_target(
        REQUEST["target"],
        run.draft,
        layer_ids=run.target.layer_ids,
        mask_token_id=run.target.mask_token_id,
    )
    with pretence.fake_tensors(compiling=False) as kernels:
        with torch.device("cuda"):
            draft = BlockDraft(spec)
        draft.execution = Execution(compile=True)
        for num_tokens, num_blocks in REQUEST["batches"]:
            num_before = len(kernels)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                states = states_of(draft, num_tokens, num_blocks)
            states.float().sum().backward()
            print(json.dumps([kernel.name for kernel in kernels[num_before:]]), flush=True)


if __name__ == "__main__":
    main()
