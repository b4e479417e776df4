"""Decode prompts greedily in a vLLM within this process; run by the Python that has vLLM.

python -P decode.py IN.json OUT.json. It takes {options, prompts, max_tokens, stop_ids}, with the
options of `vllm.LLM`, and writes {answers, drafts}: token ids, and rounds that had a draft.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams, TokensPrompt

    asked = json.loads(Path(sys.argv[1]).read_text())
    engine = LLM(dtype="float32", enforce_eager=True, disable_log_stats=False, **asked["options"])
    sampling = SamplingParams(
        temperature=0, max_tokens=asked["max_tokens"], stop_token_ids=asked["stop_ids"]
    )
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in asked["prompts"]]
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    counters = {metric.name: metric for metric in engine.get_metrics()}
    drafts = counters.get("vllm:spec_decode_num_drafts")
    found = {
        "answers": [list(output.outputs[0].token_ids) for output in outputs],
        "drafts": drafts.value if drafts else 0,
    }
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
