"""Decoding cases of the reference vectors: greedy decoding, round by round and in a batch.

m captured layers, D hidden size, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspec.config.data import SamplingConfig
from deepspec.errors import ArtifactMismatch
from deepspec.evaluate.speculate import speculate
from deepspec.model.drafter import Drafter
from deepspec.model.sampling import verify_tokens
from deepspec.target.conformance import Check, distance
from deepspec.target.generate import Decode, generate, prefill
from deepspec.target.model import Target
from tests.vectors.cases import Case, worst
from tests.vectors.training import OUTPUT

GREEDY = SamplingConfig(temperature=0)
CONFIDENCE = 5e-5  # the traces hold five decimals, and ours come back through a float32 sigmoid


def check_decoding_case(case: Case) -> list[Check]:
    """Greedy decoding round by round, then all prompts in one batch through the evaluator
    itself.
    """
    fields = case.fields
    target, draft = _target_of(case), case.draft(fields["draft_config"], [fields["draft_weights"]])
    checks = _feature_checks(target, case)
    for key in [key for key in fields if key == "results" or key.startswith("threshold_")]:
        threshold = float(key.removeprefix("threshold_")) if key != "results" else 0.0
        rounds, confidence = 0, 0.0
        for trace in fields[key]:
            replayed = replay(target, draft, trace, threshold=threshold)
            rounds, confidence = (
                rounds + replayed.differing,
                max(confidence, replayed.confidence_error),
            )
        checks += [
            Check(f"{key}: rounds that differ", float(rounds)),
            Check(f"{key}: confidence", confidence, CONFIDENCE),
        ]
    settings = Decode(GREEDY, fields["max_new_tokens"], frozenset(fields.get("stop_token_ids", ())))
    wanted = fields["results"]
    prompts = [trace["prompt"] for trace in wanted]
    seeds = range(len(prompts))
    traces, _ = speculate(target, draft, prompts, settings, seeds=seeds)
    plain = generate(target, prompts, settings, seeds=seeds)
    expected = [trace["output_ids"][len(trace["prompt"]) :] for trace in wanted]
    differing = {
        "speculative, batched": sum(
            found.token_ids != ids for found, ids in zip(traces, expected, strict=True)
        ),
        "plain, batched": sum(found != ids for found, ids in zip(plain, expected, strict=True)),
    }
    return [
        *checks,
        worst(
            "answers that differ", {name: float(count) for name, count in differing.items()}, 0.0
        ),
    ]


class Replayed(NamedTuple):
    differing: int  # rounds whose proposal, number of accepted tokens or next token is another one
    confidence_error: float  # of the logits


@torch.inference_mode()
def replay(target: Target, draft: Drafter, wanted: dict[str, Any], *, threshold: float) -> Replayed:
    """Decode one prompt as the reference did: a block is cut at the first confidence below the
    threshold.
    """
    prompt, differing, error = wanted["prompt"], 0, 0.0
    capacity = len(wanted["output_ids"]) + 2 * draft.block_size + 2
    cache, draft_cache = target.new_cache(1, capacity), draft.new_cache(1, capacity)
    context, last_hidden = prefill(target, cache, [prompt])
    anchor = target.logits(last_hidden).argmax(-1)
    draft.extend(draft_cache, context, torch.tensor([[*prompt[1:], int(anchor)]]), [len(prompt)])
    ids = [*prompt, int(anchor)]
    for step in wanted["steps"]:
        proposal = draft.propose(draft_cache, anchor, GREEDY, None)
        cut = draft.block_size
        if proposal.confidence is not None:
            cut = int((proposal.confidence[0] >= threshold).cumprod(0).sum())
            logits = torch.tensor(step.get("confidence_logits") or [])
            error = max(error, distance(proposal.confidence[0, : len(logits)].logit(), logits))
        tokens = proposal.tokens[:, :cut]
        output = target.forward(torch.cat([anchor[:, None], tokens], 1), cache)
        verdict = verify_tokens(tokens, None, target.logits(output.last_hidden), GREEDY, None)
        accepted = int(verdict.num_accepted)
        found = (tokens[0].tolist(), accepted, int(verdict.next_token))
        # the first one is the anchor
        same = found == (step["proposal"][1:], step["accepted"], step["next_token"])
        differing += not (
            same
            or (
                step is wanted["steps"][-1]
                and _ends_alike(found, step, wanted["output_ids"][len(ids) :])
            )
        )
        following = torch.cat([tokens[:, :accepted], verdict.next_token[:, None]], 1)
        draft.extend(draft_cache, output.context, following, [accepted + 1])
        cache.lengths = [cache.lengths[0] + accepted + 1]
        ids, anchor = [*ids, *following[0].tolist()], verdict.next_token
    return Replayed(differing + (ids[: len(wanted["output_ids"])] != wanted["output_ids"]), error)


def _ends_alike(found: tuple[list[int], int, int], step: dict[str, Any], output: list[int]) -> bool:
    """Whether the last round differs only after the answer's end, where a stop token or the
    length limit cuts it.
    """
    tokens, accepted, next_token = found
    proposed, committed = step["proposal"][1:], [*tokens[:accepted], next_token]
    return tokens[: len(proposed)] == proposed and committed[: len(output)] == output


def _target_of(case: Case) -> Target:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(case.fields["target_config"])
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fields.pop("model_type"), **fields), attn_implementation="sdpa"
    )
    tensors = {
        name: tensor.float() for name, tensor in case.load(case.fields["target_weights"]).items()
    }
    tied = "lm_head.weight" if model.config.get_text_config().tie_word_embeddings else ""
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {tied}:
        what = (
            "the target's weights do not fit its config: "
            f"missing {missing}, unexpected {unexpected}"
        )
        raise ArtifactMismatch(what, where=str(case.path), fix="copy the folder of vectors whole")
    return Target(model.float(), case.fields["target_layer_ids"])


def _feature_checks(target: Target, case: Case) -> list[Check]:
    """The target's captured states where the case holds them."""
    if not case.path.with_suffix(".safetensors").is_file():
        return []
    tensors = case.tensors()
    output = target.forward(tensors["input_ids"].long())
    found: dict[str, Tensor] = {
        "target_hidden_states": output.context,
        "target_last_hidden_states": output.last_hidden,
        "target_logits_last_pos": target.logits(output.last_hidden)[:, -1],
    }
    return [
        worst(
            "target's states",
            {
                name: distance(value, tensors[name])
                for name, value in found.items()
                if name in tensors
            },
            OUTPUT,
        )
    ]
