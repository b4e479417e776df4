"""Fixtures of the tests of targets."""

from __future__ import annotations

import pytest

from deepspec.target.model import Target
from tests.target.tiny_target import make_target


@pytest.fixture(scope="module")
def target() -> Target:
    return make_target()
