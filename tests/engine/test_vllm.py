"""The vLLM and the drafts that the other tests of this folder use."""

from pathlib import Path

import httpx

from deepspec.artifacts.run import Run
from tests.engine.conftest import ALGORITHMS, small_run
from tests.engine.vllm import needs_vllm, serving

pytestmark = needs_vllm


def test_the_demo_is_served(trained: Path, tmp_path: Path):
    target = Run(small_run(trained)).artifact("demo").fetch_folder("target")
    for algorithm in ALGORITHMS:
        run = Run(small_run(trained, algorithm=algorithm))
        assert (run.artifact("train").fetch_folder("draft") / "model.safetensors").is_file()
    question = {"model": "target", "messages": [{"role": "user", "content": "Hello"}]}
    with serving(target, tmp_path / "log") as url:
        reply = httpx.post(f"{url}/v1/chat/completions", json=question | {"max_tokens": 3})
    assert reply.json()["usage"]["completion_tokens"] == 3
