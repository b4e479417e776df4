"""Fixtures of the tests of targets."""

import pytest

from deepspec.target.model import Target
from tests.target.tiny_target import make_target


@pytest.fixture(scope="module")
def target() -> Target:
    return make_target()
