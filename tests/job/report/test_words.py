"""Numbers as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.report.figures import bucket_means, moving_mean
from job.report.page import code
from job.report.words import duration, number, percent, short


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.9, "1.00 k"),
        (8192, "8.19 k"),
        (573440, "573 k"),
        (999_950, "1.00 M"),
        (7340114, "7.34 M"),
        (99_970_000, "100 M"),
        (4.33e19, "43.3 E"),
        (None, "–"),
    ],
)
def test_short(value, text):
    assert short(value) == text


def test_short_with_a_unit():
    assert (short(44453619302400, "FLOP"), short(0, "FLOP")) == ("44.5 TFLOP", "0 FLOP")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.42, "0.42 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7620, "2 h 07 min"),
        (None, "–"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_negative_numbers_have_a_minus_sign():
    assert (number(-0.5), percent(-0.25)) == ("−0.500", "−25.0 %")


@given(st.floats(1e-3, 9.9e20))
def test_short_is_right_to_three_digits(value):
    digits, _, prefix = short(value).partition(" ")
    scale = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}[prefix]
    assert float(digits) * scale == pytest.approx(value, rel=0.005, abs=0.5)


@given(st.text())
def test_code_spans_keep_to_their_cell(text):
    span = code(text)
    assert "\n" not in span and "|" not in span.replace("\\|", "")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.integers(1, 60))
def test_bucket_means_keep_the_mean(values, size):
    means = bucket_means(values, size)
    weights = [len(values[i : i + size]) for i in range(0, len(values), size)]
    assert len(means) == len(weights)
    assert sum(m * w for m, w in zip(means, weights, strict=True)) == pytest.approx(sum(values), abs=1e-3)


@given(st.integers(1, 60), st.integers(0, 20), st.floats(-5, 5), st.floats(-2, 2))
def test_moving_mean_of_a_line_is_the_line_until_its_end(n, reach, start, slope):
    line = [start + slope * i for i in range(n)]
    assert moving_mean(line, reach)[: max(1, n - reach)] == pytest.approx(line[: max(1, n - reach)], abs=1e-9)
