"""A demo built in seconds: a folder that the other stages read like any model's, the same bytes
again.
"""

import json
import logging
import re
from io import StringIO
from pathlib import Path

import pytest
import torch

from deepspec.config.target import DemoConfig
from deepspec.demo.stage import build_demo
from deepspec.process.events import silent

CONFIG = DemoConfig(
    conversations=90,
    held_out=3,
    vocab_size=300,
    num_layers=2,
    hidden_size=32,
    steps=3,
    batch_tokens=400,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict], str]:
    folder, events = tmp_path_factory.mktemp("built"), []
    log = logging.getLogger("deepspec.demo.stage")
    with StringIO() as lines, pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "level", logging.INFO)
        handler = logging.StreamHandler(lines)
        log.addHandler(handler)
        build_demo(folder, CONFIG, events.append)
        log.removeHandler(handler)
        return folder, events, lines.getvalue()


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_target_loads_offline_and_speaks(built):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = built[0] / "target"
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    assert (type(model).__name__, model.config.num_hidden_layers, model.dtype) == (
        "Qwen3ForCausalLM",
        2,
        torch.float32,
    )
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert (model.generation_config.eos_token_id, tokenizer.mask_token_id) == (2, 3)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}],
        add_generation_prompt=True,
        enable_thinking=False,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]


def test_prompts_and_benchmarks_have_the_rows_that_the_stages_read(built):
    prompts = rows_of(built[0] / "prompts.jsonl")
    assert len(prompts) == CONFIG.conversations
    assert all(
        set(row) == {"messages", "domain"}
        and [turn["role"] for turn in row["messages"]] == ["user"]
        for row in prompts
    )
    asked = {row["messages"][0]["content"] for row in prompts}
    for domain in ("math", "code", "chat"):
        held_out = rows_of(built[0] / "benchmarks" / f"{domain}.jsonl")
        assert [set(row) for row in held_out] == [{"turns"}] * CONFIG.held_out
        assert asked.isdisjoint(row["turns"][0] for row in held_out)


def test_progress_and_the_log_have_the_steps_and_the_loss(built):
    _, events, line = built
    assert [(event["done"], event["total"]) for event in events] == [(1, 3), (2, 3), (3, 3)]
    summary = {name: float(value) for name, value in re.findall(r"(\w+)=([\d.]+)", line)}
    assert summary["conversations"] == 90
    assert summary["tokens"] > 90 * 50
    assert 0 < summary["loss"] < 7


def test_the_same_configuration_gives_the_same_bytes(built, tmp_path: Path):
    build_demo(tmp_path, CONFIG, silent)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(built[0]) for path in built[0].rglob("*") if path.is_file()
    )
    assert [
        str(file)
        for file in files
        if (tmp_path / file).read_bytes() != (built[0] / file).read_bytes()
    ] == []
