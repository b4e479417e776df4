"""Loading a target: what does not fit is refused first."""

import pytest

from deepspec.errors import ConfigError, DataError
from deepspec.target.loading import load_target
from tests.conftest import tiny_run
from tests.target.tiny_target import CONFIG


def test_a_model_that_is_not_there_is_refused_in_one_line(tmp_path):
    settings = tiny_run(tmp_path).target.model_copy(update={"model": str(tmp_path / "none")})
    with pytest.raises(DataError, match="cannot be loaded"):
        load_target(settings, folder=None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer_ids": (0, 3)}, r"layers \[3\].*last layer"),
        ({"layer_ids": (0, 7)}, r"layers \[7\] cannot be captured"),
        ({"mask_token_id": 97}, "outside the target's vocabulary"),
    ],
)
def test_settings_that_the_target_does_not_fit_are_refused_before_its_weights_are_read(
    change, reason, tmp_path
):
    CONFIG.save_pretrained(tmp_path)  # a config and no weights at all
    fitting = {"model": str(tmp_path), "layer_ids": (0, 2), "mask_token_id": 96}
    settings = tiny_run(tmp_path).target.model_copy(update={**fitting, **change})
    with pytest.raises(ConfigError, match=reason):
        load_target(settings, folder=tmp_path)
