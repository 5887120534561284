"""The check of a GPU runs to its end with tiny shapes on a CPU, and says what fails without stopping."""

import json

import pytest
import torch

from irpo_utils.extras import gpu_check
from irpo_utils.extras.gpu_check import Part, row


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "FOLDER", tmp_path / "gpu")
    monkeypatch.setattr(gpu_check, "work", lambda: gpu_check.ON_CPU)


FIGURES = {  # of each part, beginnings
    "device": ["memory that is free", "copying", "products in bfloat16"],
    "draws": ["greedy as generate", "greedy as generate", *["chi-square"] * 4],
    "micro": [*["irpo, seed 0"] * 5, "the last model, greedy on test"],
    "nf4": [
        "writing",
        "loading",
        "checks and reference",
        "training in NF4",
        "training in NF4, peak",
        "DPO term before",
    ],
    "small": ["sampling tiny in bfloat16", "sampling tiny, peak memory"],
    "large": ["sampling tiny in bfloat16", "sampling tiny, peak memory"],
}


@pytest.mark.parametrize("name", list(FIGURES))
def test_every_part_runs(name, tmp_path):
    gpu_check.perform(name, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert "reason" not in found, found
    assert len(found["rows"]) == len(FIGURES[name])
    for made, begins in zip(found["rows"], FIGURES[name], strict=True):
        assert made["what"].startswith(begins) and made["holds"]
        assert made["value"] is None or made["value"] >= 0
    assert list(FIGURES) == list(gpu_check.PARTS)


def test_a_sampler_of_another_distribution_is_found():
    model = gpu_check.ON_CPU.small.model(torch.float32)
    ids, right = [5, 6, 7], gpu_check.sample

    def hotter(*arguments, **options):
        return right(*arguments, **(options | {"temperature": 3.0}))

    assert gpu_check.chi_square_row("", model, ids, 0.3, 2048)["holds"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "sample", hotter)
        assert not gpu_check.chi_square_row("", model, ids, 0.3, 2048)["holds"]


def test_words_are_grouped_until_each_group_is_expected_often_enough():
    expected, seen = torch.tensor([30.0, 12, 12, 5, 3]).double(), torch.tensor([28.0, 10, 15, 4, 5]).double()
    groups, counts = gpu_check.grouped(expected, seen, least=20)
    assert groups.sum() == expected.sum() and counts.sum() == seen.sum()
    assert len(groups) > 1 and all(groups >= 20)


def test_the_floor_counts_each_byte_and_product_once():
    model = gpu_check.ModelShape(1000, 800, 10, 1, 8, 16, 4, 50, 99)
    shape = gpu_check.Shape("", 10, 20, n=5, k=1, problems=2)
    cached = 2 * 10 + 10 * 10  # two prompts once, ten responses half full
    read = gpu_check.floor_rate(model, shape, gpu_check.Peaks(1e3, 1e30))
    assert read == pytest.approx(10 * 1e3 / (2 * (1000 + 4 * cached)))
    assert gpu_check.floor_rate(model, shape, gpu_check.Peaks(1e30, 1e3)) == pytest.approx(1e3 / (2 * 1000))


def three(now):
    yield row("one", 1.0, "x", floor=2.0)
    yield row("none", None, "GiB", estimate=0.5)
    yield row("wrong", 0.5, "of the tokens", holds=False, wanted=1.0)


def broken(now):
    yield row("first", 3.0, "s")
    raise RuntimeError("no kernel image\nand more")


def test_one_part_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    parts = {"a": Part("the first", 25, broken), "b": Part("the second", 60, three), "c": Part("the third", 900, three)}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(gpu_check, "relative", str)
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: True)
    asked = []

    def here(name, patience):
        asked.append((name, patience))
        gpu_check.perform(name, tmp_path / "found.json")
        return json.loads((tmp_path / "found.json").read_text())

    monkeypatch.setattr(gpu_check, "apart", here)
    assert gpu_check.main([]) == 1
    said = capsys.readouterr().out
    assert said.index("[1/3] the first: about 25 s") < said.index("first: 3 s") < said.index("no kernel image")
    assert "  one: 1 x (floor 2)\n  none: not measured here (estimate 0.5)\n" in said
    assert "  wrong: 0.5 of the tokens (wanted 1)   NOT AS IT MUST BE" in said
    assert [name for name, _ in asked] == ["a", "b"] and asked[0][1] == 50
    facts = json.loads((tmp_path / "gpu" / "gpu.json").read_text())
    assert facts["parts"]["a"]["reason"] == "RuntimeError: no kernel image" and len(facts["parts"]["a"]["rows"]) == 1
    assert facts["parts"]["c"]["reason"] == "there is no time left for it"
    assert facts["gpu"] and facts["versions"]["torch"]
    assert "NOT AS IT MUST BE" in (tmp_path / "gpu" / "table.txt").read_text()


def test_a_part_is_a_process_that_may_die_or_hang(tmp_path, monkeypatch):
    rows = gpu_check.apart("device", 120)
    assert [made["what"] for made in rows["rows"]] == FIGURES["device"] and "reason" not in rows
    monkeypatch.setattr(gpu_check.sys, "executable", "/bin/false")
    assert gpu_check.apart("device", 60)["reason"] == "it ended with exit code 1: no message"
    sleeping = tmp_path / "sleep"
    sleeping.write_text("#!/bin/sh\nsleep 30\n")
    sleeping.chmod(0o755)
    monkeypatch.setattr(gpu_check.sys, "executable", str(sleeping))
    assert gpu_check.apart("device", 0.2)["reason"] == "it was ended after 0 s"


def test_all_parts_together_take_less_than_nine_minutes():
    assert sum(part.seconds for part in gpu_check.PARTS.values()) <= gpu_check.LIMIT < 9 * 60
