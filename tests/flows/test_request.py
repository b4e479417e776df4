"""What can be wrong with a request is found before any work."""

from pathlib import Path

import pytest
import torch

from deepspec.artifacts.run import Run
from deepspec.artifacts.status import stage_status
from deepspec.config.recipes import load_run
from deepspec.errors import ConfigError
from deepspec.process.launch import RunRequest
from flows.request import check_devices
from flows.tasks import run_stages


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a PyTorch without CUDA")
def test_gpus_that_cannot_be_used_are_refused_before_the_first_stage(
    store: Path, monkeypatch: pytest.MonkeyPatch
):
    """Prompts and answers were made, for hours where servers answer, before capture failed."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("flows.tasks.check_server", lambda: None)
    with pytest.raises(ConfigError, match="GPU 0 cannot be used: PyTorch"):
        run_stages(RunRequest("demo", store=str(store)), ("prompts", "answers", "hidden"))
    run = Run(load_run("demo", store=str(store)))
    assert stage_status(run, "prompts").committed == 0
    check_devices(RunRequest("demo", store=str(store)), run, ["demo", "prompts"])
