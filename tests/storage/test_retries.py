"""How long a request is tried again, and what comes out of it."""

import pytest

from deepspec.errors import StoreError
from deepspec.storage import retries


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), OSError("no threads left"), StoreError("no such bucket")]
)
def test_the_quick_check_hands_on_what_went_wrong(error: Exception):
    """Anything but a StoreError once came out as "no answer in 10 s", which nobody had waited
    for.
    """

    def call() -> bool:
        raise error

    with pytest.raises(type(error)) as caught:
        retries.within(10.0, call, where="here")
    assert caught.value is error
