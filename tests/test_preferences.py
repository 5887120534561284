"""Preference data: a round's pairs as other trainers read them."""

import json
from types import SimpleNamespace

import pytest
from conftest import drive
from datasets import load_dataset
from small_models import FAMILIES, build
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.data_utils import is_conversational, maybe_apply_chat_template

from irpo_utils.model.records import Pair


def written(run, folder, form, *settings):
    """The pairs of a round of the micro run, and what `datasets` reads of the file that was written of them."""
    target = folder / f"{form}.jsonl"
    done = drive("pairs", run.name, str(target), f"form={form}", *settings)
    assert done.returncode == 0, done.stderr
    rows = load_dataset("json", data_files=str(target), split="train", cache_dir=str(folder / "cache"))
    pairs = Pair.read(run / "irpo" / "seed_0" / "iteration_1" / "pairs.jsonl", "02_pairs")
    return pairs, rows, target


def trl_ids(rows, tokenizer):
    """The token ids that TRL's DPOTrainer makes of preference data."""
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    return DPOTrainer._prepare_dataset(
        trainer, rows, tokenizer, DPOConfig(max_length=None, bf16=False, use_cpu=True), "train"
    )


def test_trl_makes_the_sampled_tokens_of_the_text_form(micro_run, tmp_path, tokenizer):
    pairs, rows, _ = written(micro_run[0], tmp_path, "text", "iteration=1")
    assert rows.column_names == ["prompt", "chosen", "rejected"] and not is_conversational(rows[0])
    prepared = trl_ids(rows, tokenizer)
    assert len(prepared) == len(pairs)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert [tuple(ids) for ids in prepared[name]] == [getattr(pair, name) for pair in pairs]


def test_trl_puts_the_messages_form_through_the_chat_template(micro_run, tmp_path):
    build("qwen2", tmp_path / "model", ["How many pens has Ann? Final answer: 6"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    pairs, rows, _ = written(micro_run[0], tmp_path, "messages", "iteration=1")
    assert is_conversational(rows[0]) and len(rows) == len(pairs)
    texts = maybe_apply_chat_template(rows[0], tokenizer)
    assert texts["prompt"].endswith(f"<|im_start|>user\n{pairs[0].prompt}<|im_end|>\n<|im_start|>assistant\n")
    assert texts["chosen"].startswith(pairs[0].chosen + FAMILIES["qwen2"][2])
    prepared = trl_ids(rows, tokenizer)
    assert tokenizer.decode(prepared[0]["rejected_ids"]).startswith(pairs[0].rejected + FAMILIES["qwen2"][2])


def read_sharegpt(line):
    """A line as LLaMA-Factory's data/README.md describes preference data in ShareGPT form: what was said, and two answers."""
    row = json.loads(line)
    turns = row["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2) + ["human"]
    assert row["chosen"]["from"] == row["rejected"]["from"] == "gpt"
    return turns[-1]["value"], row["chosen"]["value"], row["rejected"]["value"]


def test_the_sharegpt_form_is_read_as_it_is_documented(micro_run, tmp_path):
    pairs, _, target = written(micro_run[0], tmp_path, "sharegpt", "method=irpo", "seed=0", "iteration=1")
    read = [read_sharegpt(line) for line in target.read_text().splitlines()]
    assert read == [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["form=csv"], "form: one of text, messages, sharegpt, got 'csv'"),
        (["rows=1"], "used as pairs RUN FILE"),
        (["method=sft_gold", "iteration=1"], "round 1 of sft_gold trains on single responses"),
        (["iteration=0"], "pairs.jsonl is missing"),
    ],
)
def test_what_cannot_be_written_is_one_error(settings, message, micro_run, tmp_path):
    done = drive("pairs", micro_run[0].name, str(tmp_path / "pairs.jsonl"), *settings)
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "pairs.jsonl").exists()


def test_a_file_that_is_there_stays(micro_run, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("mine")
    done = drive("pairs", micro_run[0].name, str(tmp_path / "pairs.jsonl"))
    assert done.returncode == 2 and "is there already" in done.stderr
    assert (tmp_path / "pairs.jsonl").read_text() == "mine"
