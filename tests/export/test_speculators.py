"""The speculators package itself reads what is exported to its format; skipped where it is not
installed.
"""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from deepspec.export.export import export_draft
from deepspec.model.checkpoint import save_draft
from tests.model.drafts import CONFIGS, VOCAB, make_draft


@pytest.mark.long
@pytest.mark.parametrize("name", ["vanilla", "dflash", "eagle3"])
def test_the_real_package_finds_every_tensor_and_the_layout(name: str, tmp_path: Path) -> None:
    """Checked with speculators 0.9.0 (`pip install speculators`)."""
    speculators = pytest.importorskip("speculators")
    save_draft(make_draft(CONFIGS[name]), tmp_path / "draft")
    export_draft(tmp_path / "draft", engine="speculators", out=tmp_path / "out")
    config = speculators.SpeculatorModelConfig.from_pretrained(str(tmp_path / "out"))
    assert config.speculators_config.proposal_methods[0].speculative_tokens == 4
    if name == "eagle3":
        assert config.eagle_aux_hidden_state_layer_ids == [1, 2, 3]
    else:
        assert (config.aux_hidden_state_layer_ids, config.mask_token_id) == ([0, 2, 3], VOCAB - 1)
        assert (config.sample_from_anchor, config.block_size) == (True, 4)
    model = speculators.SpeculatorModel.registered_model_class_from_config(config)(config)
    wanted = {
        key: tensor.shape
        for key, tensor in model.state_dict().items()
        if not key.startswith("verifier_")
    }
    assert {
        key: tensor.shape
        for key, tensor in load_file(tmp_path / "out" / "model.safetensors").items()
    } == wanted
