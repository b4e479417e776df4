"""Decode prompts greedily in vLLMs within this process; run by the Python that has vLLM.

python -P decode.py IN.json OUT.json. It takes {engines, prompts, max_tokens, stop_ids}: of each
engine, one after the other, the folder to start it in and the options of `vllm.LLM`. It writes for
each {answers, drafts}: token ids, and rounds in which a draft was verified.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def decode(asked: dict[str, Any], *, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """The answers of one engine."""
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.distributed import cleanup_dist_env_and_memory

    os.chdir(folder)
    engine = LLM(dtype="float32", enforce_eager=True, disable_log_stats=False, **options)
    sampling = SamplingParams(
        temperature=0, max_tokens=asked["max_tokens"], stop_token_ids=asked["stop_ids"]
    )
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in asked["prompts"]]
    counters = [metric for metric in engine.get_metrics() if "spec_decode" in metric.name]
    before = {metric.name: getattr(metric, "value", 0) for metric in counters}
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    after = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    name = "vllm:spec_decode_num_drafts"
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    engine.llm_engine.engine_core.shutdown()
    del engine
    cleanup_dist_env_and_memory()
    return {"answers": answers, "drafts": after.get(name, 0) - before.get(name, 0)}


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    out = Path(sys.argv[2]).resolve()
    out.write_text(json.dumps([decode(asked, **engine) for engine in asked["engines"]]))


if __name__ == "__main__":
    main()
