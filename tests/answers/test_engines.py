"""The choice of the engine."""

from pathlib import Path
from pkgutil import resolve_name
from typing import ClassVar

import pytest

from deepspec.answers.engines import IN_PROCESS, load_engine
from deepspec.answers.stage import run_answers
from deepspec.artifacts.run import Run
from deepspec.config.run import RunConfig
from deepspec.errors import ConfigError
from deepspec.prompts.stage import run_prompts
from tests.conftest import tiny_run
from tests.engines import Echo


def test_an_engine_that_cannot_be_imported_is_refused(store: Path):
    config = tiny_run(store, "answers.engine=no_such_module:Engine")
    run_prompts(Run(config))
    with pytest.raises(ConfigError, match="cannot be imported"):
        run_answers(Run(config))


class Own(Echo):
    """An engine that its user brings."""

    configs: ClassVar[list[RunConfig]] = []

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.configs.append(config)


def test_an_engine_of_ones_own_is_given_the_run_s_configuration(store: Path):
    config = tiny_run(store, "answers.engine=tests.answers.test_engines:Own")
    assert isinstance(load_engine(Run(config)), Own)
    assert Own.configs[-1] == config


def test_each_engine_of_the_table_is_there():
    for place in IN_PROCESS.values():
        assert callable(resolve_name(place).answer)
