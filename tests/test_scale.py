"""The simulation of many workers: sums that are known, and laws that hold for any."""

import math
from dataclasses import replace
from itertools import chain, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from irpo_utils.extras.scale import Workers, lifetimes, simulate

seconds = st.integers(1, 1000)  # whole numbers, whose sums are exact
chunks = st.lists(seconds, min_size=1, max_size=40)
counts = st.integers(1, 70)
chances = st.tuples(st.floats(0.1, 20), st.integers(0, 9))  # losses an hour, and a seed


def test_an_example_by_hand():
    """Two workers, three chunks of 10 s; the first worker is lost at 4 s, back at 9 s, loaded at 11 s, done at 21 s."""
    given_life = chain([4, math.inf], repeat(math.inf))
    found = simulate([10, 10, 10], Workers(2, start=2, back=5, write=1), lambda: next(given_life))
    # The second draws from 2 to 12 and from 12 to 22; the driver writes from 12, 21 and 22.
    assert (found.seconds, found.busy, found.lost, found.losses) == (23, 30, 2, (1, 0))


def test_results_wait_for_the_driver():
    """Three results at 10 s, taken at 10, 14 and 18."""
    found = simulate([10, 10, 10], Workers(3, write=4))
    assert (found.seconds, found.waited) == (22, 4 + 8)


def test_one_worker_draws_and_writes_in_turn():
    assert simulate([10, 20], Workers(1, start=5, write=1)).seconds == 5 + 10 + 1 + 20 + 1


def test_a_lost_worker_may_be_lost_again_before_it_draws():
    given_life = chain([3, 1, math.inf], repeat(math.inf))  # at 3 s; back at 5, lost at 6 while it loads; back at 8
    found = simulate([10], Workers(1, start=2, back=2), lambda: next(given_life))
    assert (found.seconds, found.lost, found.losses) == (8 + 2 + 10, 1, (2,))


@given(st.integers(1, 300), counts, seconds, seconds)
def test_equal_workers_take_the_closed_form(number, count, each, start):
    found = simulate([each] * number, Workers(count, start=start))
    assert found.seconds == start + math.ceil(number / count) * each


@given(chunks, counts, counts)
def test_more_workers_are_never_slower(times, few, more):
    assert simulate(times, Workers(few + more)).seconds <= simulate(times, Workers(few)).seconds


@given(chunks, counts, st.sampled_from([0, 3]), chances)
def test_nothing_is_lost_but_by_losses_and_all_is_done_once(times, count, write, chance):
    calm = simulate(times, Workers(count, write=write))
    assert (calm.busy, calm.lost, set(calm.losses)) == (sum(times), 0, {0})
    rough = simulate(times, Workers(count, start=7, back=11, write=write), lifetimes(*chance))
    assert rough.busy == sum(times) and (rough.lost == 0 or sum(rough.losses))
    assert rough == simulate(times, Workers(count, start=7, back=11, write=write), lifetimes(*chance))


@given(chunks, counts, chances)
def test_losses_never_make_it_faster(times, count, chance):
    workers = Workers(count, start=7, back=11)
    assert simulate(times, workers, lifetimes(*chance)).seconds >= simulate(times, workers).seconds


@given(chunks, st.integers(2, 70), st.integers(0, 50), seconds)
def test_it_takes_as_long_as_its_longest_chunk_its_share_of_the_work_and_the_driver(times, count, write, start):
    workers = Workers(count, start=start, write=write)
    found = simulate(times, workers).seconds
    assert found >= start + max(max(times), sum(times) / count, write * len(times)) + min(write, 1)
    assert found <= start + max(times) + sum(times) / count + write * len(times)


@given(chunks, counts, st.floats(1, 10))
def test_slow_workers_stretch_the_work_by_at_most_their_factor(times, count, factor):
    plain, all_slow = (simulate(times, Workers(count, slow=share, factor=factor)) for share in (0, 1))
    assert all_slow.seconds == pytest.approx(factor * plain.seconds)
    some = simulate(times, Workers(count, slow=0.3, factor=factor))
    assert sum(times) <= some.busy * (1 + 1e-9) and some.busy <= factor * sum(times) * (1 + 1e-9)


def test_losses_come_at_their_rate():
    """Two an hour of a worker that is back at once: 100 hours of work lose about 200 times."""
    found = simulate([60.0] * 6000, Workers(1), lifetimes(2, seed=0))
    hours = found.seconds / 3600
    assert abs(sum(found.losses) - 2 * hours) < 5 * math.sqrt(2 * hours)
    # Drawn until kept, a chunk of t seconds takes (e^(rate t) - 1) / rate on average.
    rate = 2 / 3600
    assert found.seconds == pytest.approx(6000 * (math.exp(rate * 60) - 1) / rate, rel=0.02)
    assert replace(found, seconds=0).busy == 360_000
