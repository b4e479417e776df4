"""Records keep the names that they have on disk, whatever the code calls their fields."""

import json

from deepspec.artifacts.records import Record
from deepspec.artifacts.records_table import read_records_table, records_table

# as an earlier version wrote it
WRITTEN = (
    '{"artifact": "a", "shard": 1, "file": "shards/00001.arrow", "num_bytes": 2, "checksum": "b",'
    ' "rows": 3, "tokens": 4, "rejected": 0, "upstream": "c", "counts": {"supervised": 5.0},'
    ' "index_checksum": "d", "made_with": "scales", "host": "h", "seconds": 1.0,'
    ' "digest": "DIGEST"}'
)


def test_the_checksum_of_the_scales_keeps_its_name_on_disk():
    record = Record.model_validate_json(WRITTEN.replace("DIGEST", "d2dcfe8dc36c928f"))
    assert record.scales_checksum == "scales"
    assert record.model_dump()["made_with"] == "scales"
    assert list(json.loads(WRITTEN)) == list(record.model_dump())
    assert read_records_table(records_table([record])) == {1: record}
    assert "scales_checksum" not in record.content()
