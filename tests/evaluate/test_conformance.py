"""The checks that a user runs on a new target, with a draft of each algorithm."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deepspec.__main__ import app
from deepspec.errors import ConfigError, DataError
from deepspec.evaluate.conformance import run_target_checks
from tests.target.test_conformance import tiny_gemma4, tiny_qwen3


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_gemma4])
def test_a_sound_target_passes_every_check(make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    checks = run_target_checks(tmp_path)
    of_drafts = {"dspark", "dflash", "dflash, anchor_is_context", "eagle3"}
    assert set(checks) == {"target", "chat", *of_drafts}
    assert [
        (part, check) for part, found in checks.items() for check in found if not check.passed
    ] == []


def test_the_command_prints_its_checks_and_ends_with_0(tmp_path: Path) -> None:
    tiny_qwen3().save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["conformance", "--model", str(tmp_path)])
    assert result.exit_code == 0
    for word in ("layer taps", "cached and uncached", "parameters without", "eagle3"):
        assert word in result.output


def test_what_cannot_be_checked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no model here"):
        run_target_checks(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="llama"):
        run_target_checks(tmp_path)
