"""Exports in the engine itself: vLLM drafts with them as this project does, round by round.

Each is served by the command of its model card.
"""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from deepspec.artifacts.run import Run
from deepspec.config.data import SamplingConfig
from deepspec.evaluate.prompts import load_benchmarks, render_turns
from deepspec.evaluate.speculate import speculate
from deepspec.evaluate.stage import load_models
from deepspec.export.export import export_draft
from deepspec.target.generate import Decode
from tests.engine.conftest import ALGORITHMS, small_run
from tests.engine.vllm import ENVIRONMENT, INTERPRETED, PYTHON, needs_vllm, serving

pytestmark = [*needs_vllm, pytest.mark.timeout(900)]  # two engines, one core, interpreted

SCRIPT = Path(__file__).with_name("decode.py")
NUM_PROMPTS, MAX_TOKENS, MAX_LENGTH = 20, 20, 512
ENGINES = ("vllm", "speculators")
STOCK = ("eagle3", "dflash-context")  # whose runner does without Triton


class Decoded(NamedTuple):
    """What an engine made of the prompts."""

    answers: list[list[int]]
    drafts: int  # rounds in which a draft was verified, over all prompts


class Questions(NamedTuple):
    """Prompts of the demo's benchmarks as token ids, and what ends an answer."""

    target: Path
    prompts: list[list[int]]
    stop_ids: list[int]


@pytest.fixture(scope="module")
def questions(trained: Path) -> Questions:
    run = Run(small_run(trained))
    models = load_models(run)
    turns = [turns for benchmark in load_benchmarks(run) for turns in benchmark.prompts]
    prompts = [render_turns(models.chat, each).input_ids for each in turns[:NUM_PROMPTS]]
    assert len(prompts) == NUM_PROMPTS
    target = run.artifact("demo").fetch_folder("target")
    return Questions(target, prompts, sorted(models.stop_ids))


@pytest.fixture(scope="module")
def plain(questions: Questions, tmp_path_factory: pytest.TempPathFactory) -> Decoded:
    """The answers of vLLM without a draft."""
    folder = tmp_path_factory.mktemp("plain")
    (found,) = in_vllm(questions, {folder: {"model": str(questions.target)}}, folder)
    assert found.drafts == 0
    return found


CASES = [pytest.param(name, marks=() if name in STOCK else pytest.mark.long) for name in ALGORITHMS]


@pytest.fixture(scope="module", params=CASES)
def served(
    request: pytest.FixtureRequest,
    trained: Path,
    questions: Questions,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, dict[str, Decoded]]:
    """An algorithm, and the answers of vLLM with its draft in each format."""
    algorithm, work = request.param, tmp_path_factory.mktemp("served")
    options: dict[Path, dict[str, Any]] = {}
    for engine in ENGINES:
        vllm, serve, model, *rest = exported(trained, algorithm, engine, work / engine)
        assert (vllm, serve) == ("vllm", "serve")
        options[work / engine] = {"model": model}
        if rest:
            option, settings = rest
            assert option == "--speculative-config"
            options[work / engine]["speculative_config"] = json.loads(settings)
    more = {} if algorithm in STOCK else INTERPRETED
    found = in_vllm(questions, options, work, **more)
    return algorithm, dict(zip(ENGINES, found, strict=True))


def in_vllm(
    questions: Questions, engines: dict[Path, dict[str, Any]], work: Path, **more: str
) -> list[Decoded]:
    """The answers of vLLMs, each started in a folder with its options, in a process of its own."""
    limit = {"max_model_len": MAX_LENGTH}
    asked = {
        "engines": [
            {"folder": str(folder), "options": options | limit}
            for folder, options in engines.items()
        ],
        "prompts": questions.prompts,
        "stop_ids": questions.stop_ids,
        "max_tokens": MAX_TOKENS,
    }
    (work / "in.json").write_text(json.dumps(asked))
    done = subprocess.run(
        [str(PYTHON), "-P", str(SCRIPT), str(work / "in.json"), str(work / "out.json")],
        env=os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | more,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [Decoded(**found) for found in json.loads((work / "out.json").read_text())]


def exported(store: Path, algorithm: str, engine: str, out: Path) -> list[str]:
    """Export a trained draft; the first command of its card."""
    artifact = Run(small_run(store, algorithm=algorithm)).artifact("train")
    export_draft(artifact.url, engine=engine, out=out)
    card = (out / "README.md").read_text()
    command = re.search(r"```sh\n(.*?)\n```", card, re.DOTALL)
    assert command is not None
    return shlex.split(command.group(1))


def num_rounds(store: Path, algorithm: str, questions: Questions) -> int:
    """The rounds of decoding with the draft here.

    The first token of an answer comes from the prompt's own pass, which is no round in either.
    """
    target, draft, *_ = load_models(Run(small_run(store, algorithm=algorithm)))
    settings = Decode(SamplingConfig(temperature=0), MAX_TOKENS, questions.stop_ids)
    seeds = range(len(questions.prompts))
    traces, _ = speculate(target, draft, questions.prompts, settings, seeds=seeds)
    return sum(len(trace.proposed) for trace in traces)


@pytest.mark.parametrize("engine", ENGINES)
def test_vllm_drafts_as_we_do_and_answers_as_without_a_draft(
    engine: str,
    served: tuple[str, dict[str, Decoded]],
    trained: Path,
    questions: Questions,
    plain: Decoded,
):
    """A wrong layer, layout or norm shows in the rounds alone: answers stay those of the target."""
    algorithm, found = served
    assert found[engine].answers == plain.answers
    assert found[engine].drafts == num_rounds(trained, algorithm, questions)


@pytest.mark.long
def test_a_speculators_folder_is_served_by_itself(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`vllm serve FOLDER` finds the target by the name that the folder gives."""
    out = tmp_path / "out"
    assert exported(trained, "eagle3", "speculators", out) == ["vllm", "serve", "."]
    monkeypatch.chdir(out)
    question = {"model": "target", "messages": [{"role": "user", "content": "What is 3 + 4?"}]}
    with serving(Path(), tmp_path / "log") as url:
        reply = httpx.post(f"{url}/v1/chat/completions", json=question | {"max_tokens": 16})
        metrics = httpx.get(f"{url}/metrics").text
    assert reply.json()["usage"]["completion_tokens"] > 1
    drafts = re.search(r"^vllm:spec_decode_num_drafts_total\{.*\} (\S+)$", metrics, re.MULTILINE)
    assert drafts is not None
    assert float(drafts.group(1)) > 0
