"""The summary says what was planted, with its number and its controls, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnbias.report import ReportData, summarise
from attnbias.report.summary import NONE_FOUND, STANDING
from attnbias.report.thresholds import RECEIVED_TIMES, percent, times
from tests.report.made import HEADS, LAYERS, even_data, even_word, planted, sink_data


def finding(data, key):
    return next(one for one in summarise(data).findings if one.key == key)


def test_even_attention_is_no_bias():
    found = summarise(even_data())
    assert found.verdict.startswith(NONE_FOUND)
    assert not found.strong
    assert found.standing == STANDING
    assert "not importance" in STANDING
    assert all(one.threshold and len(one.controls) == 2 for one in found.findings)


def test_a_planted_sink_is_told_with_number_place_and_controls():
    data = sink_data()
    one = finding(data, "first_token")
    assert one.strong
    assert one.statement.startswith("In 3 of 72 heads at least 30%")
    assert "“[CLS]”" in one.statement
    assert "layer 1, head 3, 66% (even: 7.7%)" in one.strongest
    assert "2 of 72 heads; most 62%" in one.controls[0]
    assert "0 of 72 heads; most 8." in one.controls[1]
    assert "does not hang on the order" in one.reading
    assert "attention to the first token" in summarise(data).verdict
    assert summarise(data).standing == STANDING


def test_the_number_follows_the_plant():
    first, *rest = even_data().maps
    for share, shown in ((0.31, "31%"), (0.97, "97%")):
        one = replace(first, values=planted(first.values, {(5, 11): share}))
        told = finding(replace(even_data(), maps=(one, *rest)), "first_token")
        assert told.statement.startswith("In 1 of 72 heads")
        assert f"layer 5, head 11, {shown}" in told.strongest
    just_under = replace(first, values=planted(first.values, {(5, 11): 0.299}))
    assert not finding(replace(even_data(), maps=(just_under, *rest)), "first_token").strong


def test_what_random_weights_show_as_well_is_not_called_a_bias():
    first, *rest = sink_data().maps
    shown = replace(first, random=planted(first.random, {(0, 0): 0.5, (0, 1): 0.5}))
    one = finding(replace(sink_data(), maps=(shown, *rest)), "first_token")
    assert not one.strong
    assert "comes with the architecture" in one.reading


def interval_data(low: float) -> ReportData:
    """One head at 40% on the first token, whose interval begins at `low`."""
    first, *rest = even_data().maps
    one = replace(
        first,
        values=planted(first.values, {(2, 2): 0.4}),
        low=planted(first.values, {(2, 2): low}),
        high=planted(first.values, {(2, 2): 0.5}),
    )
    return even_data(maps=(one, *rest), blocks=16)


def test_a_head_counts_as_strong_with_all_of_its_interval():
    sure = finding(interval_data(0.33), "first_token")
    assert sure.strong
    assert "40% (95% interval 33% to 50%; even: 7.7%)" in sure.strongest
    assert sure.interval.endswith("16 blocks of query positions), 1 to 1 of 72 heads pass.")
    assert sure.heads == (("text", 2, 2),)
    assert sure.counts == (1, 0, 0)
    unsure = finding(interval_data(0.2), "first_token")
    assert not unsure.strong
    assert unsure.interval.endswith("0 to 1 of 72 heads pass.")
    assert summarise(interval_data(0.2)).verdict.startswith(NONE_FOUND)


def test_other_heads_than_those_found_do_not_count_as_staying():
    first, *rest = sink_data().maps
    moved = {(0, 0): 0.9, (0, 1): 0.9, (0, 2): 0.9}
    shown = replace(first, shuffled=planted(even_data().maps[0].shuffled, moved))
    one = finding(replace(sink_data(), maps=(shown, *rest)), "first_token")
    assert "3 of 72 heads" in one.controls[0]
    assert "hangs on the order" in one.reading


def test_what_hangs_on_the_order_of_words_is_told_so():
    first, *rest = sink_data().maps
    shown = replace(first, shuffled=even_data().maps[0].shuffled)
    one = finding(replace(sink_data(), maps=(shown, *rest)), "first_token")
    assert one.strong
    assert "hangs on the order" in one.reading


@pytest.mark.parametrize(("key", "value"), [("entropy", 0.4), ("distance", 0.9)])
def test_low_values_are_found_for_narrow_and_local_heads(key, value):
    maps = tuple(
        replace(one, values=planted(one.values, {(2, 2): value})) if one.statistic == key else one
        for one in even_data().maps
    )
    one = finding(replace(even_data(), maps=maps), key)
    assert one.strong
    assert one.statement.startswith("In 1 of 72 heads")
    assert "layer 2, head 2" in one.strongest


def test_thresholds_follow_the_even_value_of_the_layer():
    """A windowed layer has a smaller even distance; its heads are not local for that alone."""
    distance = next(one for one in even_data().maps if one.statistic == "distance")
    grid = [list(row) for row in distance.values]
    grid[3] = [0.9] * HEADS
    windowed = replace(
        distance,
        values=tuple(map(tuple, grid)),
        even=tuple(1.0 if n == 3 else distance.even[n] for n in range(LAYERS)),
    )
    assert not finding(replace(even_data(), maps=(windowed,)), "distance").strong
    same = replace(windowed, even=distance.even)
    assert finding(replace(even_data(), maps=(same,)), "distance").strong


def test_words_are_found_by_times_of_their_even_share():
    words = (
        even_word("[CLS]", 0, special=True),
        even_word("hub", 1, received=RECEIVED_TIMES, shuffled=1.0),
        even_word("a", 2),
    )
    one = finding(replace(even_data(), words=words), "received")
    assert one.strong
    assert one.statement.startswith("1 of 3 words receives")
    assert "“hub” 4 times" in one.strongest
    assert "“hub” 1.0 times" in one.controls[0]


def test_a_place_that_receives_whatever_stands_there_is_told_from_a_word():
    def read(**changes):
        words = (even_word("a", 0), even_word("end", 1, received=50.0, **changes))
        return finding(replace(even_data(), words=words), "received")

    place = read(shuffled=1.0, in_place=40.0)
    assert "places, not to words" in place.reading
    assert "“end” 1.0 times, what stands in its place 40 times" in place.controls[0]
    assert "places, not to words" not in read(shuffled=40.0, in_place=1.0).reading
    assert "hangs on the order" in read(shuffled=1.0, in_place=1.0).reading


def test_heads_without_a_number_are_left_out():
    first, *rest = sink_data().maps
    holes = replace(first, values=planted(first.values, {(1, 3): float("nan")}))
    one = finding(replace(sink_data(), maps=(holes, *rest)), "first_token")
    assert one.statement.startswith("In 2 of 71 heads")
    assert "41%" in one.strongest


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0.0%"), (0.0004, "under 0.1%"), (0.077, "7.7%"), (0.5, "50%"), (1.0, "100%")],
)
def test_percent(value, shown):
    assert percent(value) == shown
    assert percent(float("nan")) == "not measured"
    assert times(float("nan")) == "not measured"
