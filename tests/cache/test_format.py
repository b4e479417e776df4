"""A sample as one row of a record batch."""

import pytest
import torch

from deepspec.cache.format import Layout, last_hidden_spans
from deepspec.errors import ArtifactMismatch
from tests.cache.samples import LAYOUT, SIZE, make_sample


@pytest.mark.parametrize(
    ("mask", "spans"),
    [
        ([0, 0, 1, 1, 0, 0], [[1, 4]]),
        ([1, 0, 0, 0, 1], [[0, 2], [3, 2]]),
        ([1, 0, 1], [[0, 3]]),
        ([0, 0, 0], []),
        ([1], [[0, 1]]),
        ([], []),
    ],
)
def test_the_final_state_is_kept_one_position_beyond_each_supervised_run(
    mask: list[int], spans: list[list[int]]
):
    assert last_hidden_spans([bool(value) for value in mask]).tolist() == spans


def test_kept_final_states_go_back_to_their_places():
    sample, full = make_sample(1, 8), torch.zeros(10, SIZE, dtype=torch.bfloat16)
    sample.place_last_hidden(full)
    kept = [
        index
        for start, length in sample.last_spans.tolist()
        for index in range(start, start + length)
    ]
    assert torch.equal(full[kept], sample.last_hidden.decode())
    assert full[[index for index in range(10) if index not in kept]].abs().sum() == 0


def test_the_schema_tells_what_each_column_holds():
    schema = LAYOUT.schema
    assert schema.metadata[b"target"] == b"tiny"
    assert schema.field("context").metadata == {b"dtype": b"bfloat16", b"shape": b"[2, 8]"}
    assert Layout.of(schema.serialize().to_pybytes(), {}).schema.serialize() == schema.serialize()


def test_another_format_version_is_refused():
    schema = LAYOUT.schema.with_metadata({**LAYOUT.schema.metadata, b"version": b"2"})
    with pytest.raises(ArtifactMismatch, match="version 2"):
        Layout.of(schema.serialize().to_pybytes(), {})
