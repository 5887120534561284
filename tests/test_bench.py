"""The benchmark runs and counts the work of every contender; how fast is not a test's business."""

import pytest

from irpo_utils import bench

SMALL = bench.Shape("small", 12, 8, n=4, k=2, problems=2, hidden=64, layers=1)


def test_every_contender_draws_the_same_number_of_tokens(monkeypatch):
    ticks = iter(range(1_000_000))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(ticks)))  # every work takes one tick
    found = bench.bench_sampling(SMALL, repeats=1)
    assert set(found) == {"ours", "generate, 1 prompts a batch", "generate, 2 prompts a batch"}
    drawn = {name: values[0] for name, values in found.items() if name != "ours"}  # the sampler itself reads the clock
    assert set(drawn.values()) == {2 * 4 * 8.0}


def test_training_contenders_run_to_the_end():
    found = bench.bench_training(SMALL, repeats=1)
    assert len(found) >= 2 and "ours" in found
    assert all(value > 0 for values in found.values() for value in values)


def test_pairs_have_what_both_trainers_need():
    prompts = {"a": [5, 6, 7]}
    pairs = bench.make_pairs(SMALL, prompts)
    assert len(pairs) == SMALL.k
    assert all(
        p["chosen_ids"][-1] == p["rejected_ids"][-1] == 1 and p["chosen_ids"] != p["rejected_ids"] for p in pairs
    )
    assert len(bench.alternate({"x": lambda: 1.0}, repeats=3)["x"]) == 3
    with pytest.raises(StopIteration):
        bench.alternate({"x": iter([1.0]).__next__}, repeats=1)
