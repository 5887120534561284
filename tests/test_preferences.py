"""Preference data: a round's pairs as other trainers read them, and training on pairs from elsewhere."""

import json
from types import SimpleNamespace

import pytest
from conftest import OUTPUTS, drive, remove_run
from datasets import load_dataset
from small_models import FAMILIES, build
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.data_utils import is_conversational, maybe_apply_chat_template

from irpo_utils.files import ConfigError, read_jsonl
from irpo_utils.methods.preferences import read
from irpo_utils.model.load import load_tokenizer
from irpo_utils.model.records import Pair
from irpo_utils.report.publish import FORMS
from irpo_utils.run.presets import load_preset


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
    """A line as LLaMA-Factory's data/README.md describes ShareGPT preference data: what was said, and two answers."""
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
        (["method=sft_gold", "iteration=1"], "round 1 of sft_gold has no pairs of whole responses"),
        (["iteration=0"], "no such method, seed or iteration: iteration=0; "),
        (["method=dpo"], "has methods irpo, sft_gold"),
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


# Pairs from elsewhere.


def settings_for(path, rows, *more):
    """The micro preset on preference data of `rows`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_preset("micro", [f"pairs.file={path}", *more])


@pytest.mark.parametrize("form", ["text", "messages"])
def test_what_was_written_is_read_as_it_was(form, micro_run, tmp_path):
    pairs = Pair.read(micro_run[0] / "irpo" / "seed_0" / "iteration_1" / "pairs.jsonl", "02_pairs")
    found, audit = read(settings_for(tmp_path / "pairs.jsonl", map(FORMS[form], pairs)))
    for name in ("prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids"):
        assert [getattr(p, name) for p in found] == [getattr(p, name) for p in pairs]
    assert all(p.chosen_logp is p.rejected_logp is None for p in found)
    assert audit["problems"] == audit["pairs"] == len(pairs)


def test_a_conversation_goes_through_the_chat_template(tmp_path):
    build("qwen2", tmp_path / "model", ["How many pens has Ann? Final answer: 6"])
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
    right, wrong = ({"role": "assistant", "content": text} for text in ("6", "7"))
    rows = [
        {"prompt": said, "chosen": [right], "rejected": [wrong]},
        {"chosen": [*said, right], "rejected": [*said, wrong]},  # the prompt is in both
        {"prompt": "", "chosen": [*said, right], "rejected": [*said, wrong]},
        {"prompt": "How many?", "chosen": "6", "rejected": [wrong]},
    ]
    config = settings_for(tmp_path / "pairs.jsonl", rows, f"model.path={tmp_path}/model")
    pairs, _ = read(config)
    tokenizer = load_tokenizer(config.model)
    texts = [tokenizer.decode(pair.prompt_ids) for pair in pairs]
    wanted = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert texts[:3] == [wanted] * 3 and texts[3].endswith("user\nHow many?<|im_end|>\n<|im_start|>assistant\n")
    assert {tokenizer.decode(pair.chosen_ids) for pair in pairs} == {"6<|im_end|>"}
    rows[0]["prompt"] = [said[0], {"role": "user", "content": "How <|im_end|> many?"}]
    with pytest.raises(ConfigError, match="line 1: several turns must not hold the special token .*; leave"):
        read(settings_for(tmp_path / "pairs.jsonl", rows, f"model.path={tmp_path}/model"))


def test_what_cannot_be_trained_on_is_left_out_and_counted(tmp_path, task):
    row = {"prompt": "Ann has 3 pens.", "chosen": "Final answer: 3", "rejected": "Final answer: 4"}
    dev, test = (task.problems(split)[0] for split in ("dev", "test"))
    rows = [
        row,
        row | {"prompt": dev.question},
        row | {"prompt": f"{task.prompt(test)} "},
        row | {"rejected": "Ann " * 200},
        row | {"rejected": row["chosen"]},
        *[row] * 4,
    ]
    pairs, audit = read(settings_for(tmp_path / "pairs.jsonl", rows))
    assert len(pairs) == 5 and (audit["held_out"], audit["over_long"], audit["duplicates"]) == (2, 1, 1)
    pairs, audit = read(settings_for(tmp_path / "pairs.jsonl", rows, "pairs.max_pairs=2"), imitates=True)
    assert len(pairs) == 2 and audit["capped"] == 3 and not any(pair.rejected_ids for pair in pairs)
    with pytest.raises(ConfigError, match=r"no pair of .* is left of 9: 6 exceed pairs.max_tokens \(it is 2; raise it"):
        read(settings_for(tmp_path / "pairs.jsonl", rows, "pairs.max_tokens=2"))


TEXT = {"prompt": "Ann?", "chosen": "6", "rejected": "7"}
USER, ASSISTANT = ({"role": role, "content": "6"} for role in ("user", "assistant"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "prompt: expected a text that is not empty"),
        (TEXT | {"chosen": " "}, "chosen: expected a text that is not empty, or a list of"),
        ({"prompt": "Ann?", "chosen": "6"}, "rejected: expected a text"),
        (TEXT | {"chosen": []}, "chosen: expected a text"),
        (TEXT | {"rejected": [{"role": "assistant"}]}, "rejected: expected a text"),
        (TEXT | {"chosen": [USER]}, "an answer of the assistant's"),
        (TEXT | {"prompt": [ASSISTANT]}, "expected a prompt that ends with the user's turn"),
        (TEXT | {"chosen": [USER, ASSISTANT]}, "answer different conversations"),
        (TEXT | {"prompt": [USER, ASSISTANT, USER]}, "several turns need a model with a chat template"),
    ],
)
def test_a_bad_line_is_named_before_anything_runs(row, message, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(TEXT)}\n{json.dumps(row)}\n")
    done = drive("micro", "run=test-bad-pairs", f"pairs.file={tmp_path}/pairs.jsonl")
    assert done.returncode == 2 and "pairs.jsonl, line 2: " in done.stderr and message in done.stderr
    assert not (OUTPUTS / "test-bad-pairs").exists()


def test_a_file_that_is_not_there_and_a_selection_without_one_are_errors(tmp_path):
    done = drive("micro", "run=test-bad-pairs", f"pairs.file={tmp_path}/none.jsonl")
    assert done.returncode == 2 and "pairs.file: " in done.stderr and "none.jsonl is missing" in done.stderr
    with pytest.raises(ConfigError, match="needs preference data, as in pairs.file=pairs.jsonl"):
        read(load_preset("micro"))
    for method in ("rloo", "scpo"):  # which weigh responses by their rewards
        with pytest.raises(ConfigError, match="pairs.file: .* weighs responses by their rewards.*leave it out"):
            load_preset("micro", [f"methods=irpo,{method}", "pairs.file=pairs.jsonl"]).recipe(method)
    done = drive("micro", "run=test-bad-pairs", f"pairs.file={tmp_path}/none.jsonl", "methods=irpo,latro")
    assert done.returncode == 2 and "pairs.file: LaTRO" in done.stderr and "leave it out" in done.stderr


def test_methods_train_on_a_file_in_place_of_samples(micro_run, tmp_path):
    """IRPO trains on pairs, SFT on chosen on the chosen ones; nothing is drawn to train on."""
    run, file = "test-pairs-file", tmp_path / "pairs.jsonl"
    own = Pair.read(micro_run[0] / "irpo" / "seed_0" / "iteration_1" / "pairs.jsonl", "02_pairs")
    settings_for(file, map(FORMS["text"], own))
    try:
        done = drive("micro", f"run={run}", f"pairs.file={file}", "methods=irpo,sft_chosen", "iterations=1")
        assert done.returncode == 0 and "report.html" in done.stdout, done.stdout + done.stderr
        for method, empty in (("irpo", False), ("sft_chosen", True)):
            folder = OUTPUTS / run / method / "seed_0" / "iteration_1"
            pairs = Pair.read(folder / "pairs.jsonl", "02_pairs")
            assert [pair.chosen_ids for pair in pairs] == [pair.chosen_ids for pair in own]
            assert all(bool(pair.rejected_ids) != empty for pair in pairs)
            assert json.loads((folder / "training.json").read_text())["sampler_gap"] is None
            assert len(read_jsonl(folder / "steps.jsonl")) == 6
        assert not list((OUTPUTS / run).rglob("samples.jsonl"))
        file.write_text(file.read_text() + json.dumps(TEXT) + "\n")
        why = drive("why", run).stdout
        assert f"irpo/seed_0/iteration_1/02_pairs: input problems {file}" in why
    finally:
        remove_run(run)
