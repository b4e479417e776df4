"""Greedy speculative decoding reproduces the reference round by round, with and without a confidence threshold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepspec.config import SamplingConfig
from deepspec.model.sampling import verify
from tests.model.vectors import FOLDER, read_case, read_draft

GREEDY = SamplingConfig(temperature=0)


def tiny_target(case: dict[str, Any]) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    target = Qwen3ForCausalLM(Qwen3Config(**case["target_config"])).eval()
    weights = {name: tensor.float() for name, tensor in load_file(FOLDER / case["target_weights"]).items()}
    target.load_state_dict(weights, strict=True)
    return target


def target_pass(target: Any, layer_ids: list[int], tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Context features [1, T, m * D] and logits [1, T, V] of a whole sequence, without a cache."""
    output = target(torch.tensor([tokens]), output_hidden_states=True)
    return torch.cat([output.hidden_states[layer + 1] for layer in layer_ids], -1), output.logits


@pytest.mark.parametrize(("key", "threshold"), [("results", 0.0), ("threshold_0.6", 0.6)])
@torch.inference_mode()
def test_greedy_decoding_reproduces_the_reference_round_by_round(key: str, threshold: float) -> None:
    case, _ = read_case("decode_qwen3_dspark")
    target, draft = tiny_target(case), read_draft(case["draft_config"], [case["draft_weights"]])
    for wanted in case[key]:
        ids, cache = list(wanted["prompt"]), draft.new_cache(1, 128)
        context, logits = target_pass(target, case["target_layer_ids"], ids)
        draft.prefill(cache, context, torch.zeros(1, len(ids), dtype=torch.long), [len(ids)])
        ids.append(int(logits[0, -1].argmax()))
        for step in wanted["steps"]:
            proposal = draft.propose(cache, torch.tensor(ids[-1:]), GREEDY, None)
            assert proposal.confidence is not None
            cut = int((proposal.confidence[0] >= threshold).cumprod(0).sum())
            drafted = proposal.tokens[0, :cut].tolist()
            proposed = step["proposal"][1:]  # the first one is the anchor
            limit = len(proposed)  # the last round of a prompt is cut where the answer ends
            assert drafted[:limit] == proposed
            if step["confidence_logits"]:
                logit = torch.logit(proposal.confidence[0, : len(step["confidence_logits"])])
                torch.testing.assert_close(logit, torch.tensor(step["confidence_logits"]), rtol=0, atol=5e-5)
            start = len(ids) - 1
            context, logits = target_pass(target, case["target_layer_ids"], ids + drafted)
            verdict = verify(proposal.tokens[:, :cut], None, logits[:, start:], GREEDY, None)
            accepted = int(verdict.num_accepted)
            assert (accepted, int(verdict.next_token)) == (step["accepted"], step["next_token"])
            following = torch.tensor([[*drafted[:accepted], int(verdict.next_token)]])
            draft.accept(cache, context[:, start : start + accepted + 1], following, [accepted + 1])
            ids += following[0].tolist()
        assert ids[: len(wanted["output_ids"])] == wanted["output_ids"]
