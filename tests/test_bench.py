"""The benchmark runs and counts the work of every contender; how fast is not a test's business."""

from contextlib import ExitStack

import pytest
from small_models import build

from irpo_utils.extras import bench
from irpo_utils.settings import TaskConfig
from irpo_utils.tasks import get_task

SMALL = bench.Shape("small", 12, 8, n=4, k=2, problems=2, hidden=64, layers=1)


def test_every_contender_draws_the_same_number_of_tokens(monkeypatch):
    ticks = iter(range(1_000_000))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(ticks)))  # every work takes one tick
    found = bench.samplers(SMALL, ExitStack())
    assert set(found) == {"ours", "generate, 1 prompts a batch", "generate, 2 prompts a batch"}
    drawn = {work() for name, work in found.items() if name != "ours"}  # the sampler itself reads the clock
    assert drawn == {2 * 4 * 8.0}


def test_training_contenders_run_to_the_end():
    found = bench.trainers(SMALL)
    assert len(found) == 3 and all(work() > 0 for work in found.values())


def test_a_model_of_a_folder_is_asked_in_words_and_trains_an_adapter(tmp_path):
    folder = build("llama", tmp_path / "model", [p.question for p in get_task(TaskConfig()).problems("train")[:20]])
    shape = bench.Shape("real", 0, 6, n=2, k=2, problems=2, model=str(folder), written=4, trained=2, lora=True)
    _, tokenizer, prompts, _ = bench.load(shape)
    assert all("Final answer: ..." in tokenizer.decode(ids) for ids in prompts.values())
    assert all(work() > 0 for work in bench.samplers(shape, ExitStack()).values())
    assert all(work() > 0 for work in bench.trainers(shape).values())


@pytest.mark.skipif(not bench.Path("/proc/self/clear_refs").exists(), reason="no high-water mark to reset")
def test_peak_memory_is_over_what_was_there(monkeypatch):
    monkeypatch.setattr(bench, "trainers", lambda shape: {"ours": lambda: float(bench.torch.ones(64 << 20).sum())})
    assert 240 << 20 < bench.peak(SMALL, "ours") < 300 << 20


def test_pairs_have_what_both_trainers_need():
    prompts = {"a": [5, 6, 7]}
    pairs = bench.make_pairs(SMALL, prompts)
    assert len(pairs) == SMALL.k
    assert all(
        pair.chosen_ids[-1] == pair.rejected_ids[-1] == 1 and pair.chosen_ids != pair.rejected_ids for pair in pairs
    )
    tokenizer = bench.word_tokenizer()
    for pair in pairs:  # a contender that reads text sees the same ids, and adds the EOS
        assert tuple(tokenizer(pair.prompt).input_ids) == pair.prompt_ids
        assert tuple(tokenizer(pair.chosen + tokenizer.eos_token).input_ids) == pair.chosen_ids
    assert len(bench.alternate({"x": lambda: 1.0}, repeats=3)["x"]) == 3
    with pytest.raises(StopIteration):
        bench.alternate({"x": iter([1.0]).__next__}, repeats=1)
