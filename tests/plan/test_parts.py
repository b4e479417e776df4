"""Numbers that a plan consists of."""

from deepspec.formatting import human_bytes, human_count, human_hours
from deepspec.plan.parts import Fit, Number, histogram


def test_a_number_knows_how_it_is_known_and_shown():
    number = Number(36e12, "sample of 2", human_bytes)
    assert (number / 2, number.origin, number.show(number)) == (18e12, "sample of 2", "36.0 TB")


def test_quantiles_and_bins_of_lengths():
    found = histogram([*range(1, 101)])
    assert (found.p5, found.p50, found.p95, found.max) == (6, 51, 96, 100)
    assert sum(found.bins) == 100
    assert histogram([]).max == 0
    assert histogram([7]).p50 == 7


def test_a_cache_fits_while_the_reserve_stays_free():
    assert Fit(8e9, 10e9, 2e9).fits
    assert not Fit(8.5e9, 10e9, 2e9).fits


def test_a_store_without_a_limit_holds_anything():
    assert Fit(1e18, None, 5e9).fits


def test_numbers_read_well():
    assert [human_bytes(size) for size in (0, 720, 36e12, 1.56e9, 999.9e3)] == [
        "0 B",
        "720 B",
        "36.0 TB",
        "1.56 GB",
        "1.00 MB",
    ]
    assert [human_count(count) for count in (0.779, 960, 1.24e9)] == ["0.779", "960", "1.24 G"]
    assert [human_hours(hours) for hours in (0.5 / 3600, 0.5, 30, 24 * 30)] == [
        "0.5 s",
        "30.0 min",
        "30.0 h",
        "30.0 days",
    ]
