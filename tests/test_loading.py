"""What is loaded is what the files say: no weight made up, and text is text whatever it says."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import FAMILIES, build
from transformers import AddedToken

from irpo_utils.model.load import load_base, load_policy, load_tokenizer, new_adapter, save
from irpo_utils.model.prompts import PLACE, chat_prompt, encode_prompts, encode_response, ending_tokens, special_names
from irpo_utils.settings import ModelConfig
from irpo_utils.tasks.base import Problem

TEXTS = ["What is 2 + 3? Show how. 1 0 Final answer: 5", "user assistant system model im end start of turn"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: build(family, tmp_path_factory.mktemp(family), TEXTS) for family in FAMILIES}


def altered(folder, tmp_path, change):
    """A copy of a model with other weights."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return ModelConfig(path=str(tmp_path))


def drop(weights):
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        del weights[name]


def add(weights):
    weights["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)


def shorten(weights):
    weights["model.norm.weight"] = weights["model.norm.weight"][:5].clone()


def spoil(value):
    def change(weights):
        weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "has no weights for model.layers.0.self_attn.q_proj.weight, model.layers.1.mlp.up_proj.weight"),
        (add, "has weights that its architecture does not take: model.layers.7.mlp.up_proj.weight"),
        (shorten, "has weights of another shape for model.norm.weight"),
        (spoil(float("nan")), "has NaN or infinite weights in model.layers.1.mlp.up_proj.weight"),
        (spoil(float("inf")), "has NaN or infinite weights in model.layers.1.mlp.up_proj.weight"),
    ],
)
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_model_that_is_not_the_one_in_its_files_is_refused(folders, tmp_path, change, message, quantize):
    config = altered(folders["qwen2"], tmp_path, change).but(quantize=quantize)
    with pytest.raises(ValueError, match=f"model.path: .*{message}"):
        load_base(config)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "llama2"])
def test_whole_models_are_loaded_tied_weights_or_not(folders, family):
    load_base(ModelConfig(path=str(folders[family])))


def test_a_trained_model_that_lost_weights_is_refused(folders, tmp_path):
    config = ModelConfig(path=str(folders["llama"]), tuning="full")
    save(load_policy(config, trainable=True), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    drop(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has no weights for model.layers.0"):
        load_policy(config, tmp_path)


def test_an_adapter_s_files_do_not_say_where_the_project_lies(tmp_path):
    save(new_adapter(load_base(ModelConfig()), ModelConfig()), tmp_path)
    base = json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == "irpo_utils/assets/seed_model"


def ids_of(tokenizer, question):
    return encode_prompts(Plain(), tokenizer, [Problem("p", question, "5")])["p"]


class Plain:
    """A task whose prompt is the question."""

    def prompt(self, problem):
        return problem.question


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chat", [True, False])
def test_a_special_token_s_name_in_a_problem_is_text(folders, family, chat):
    tokenizer = load_tokenizer(ModelConfig(path=str(folders[family])))
    if not chat:
        tokenizer.chat_template = None
    special = special_names(tokenizer)
    plain = ids_of(tokenizer, "What is 2 + 3?")
    for name in special.values():
        hostile = ids_of(tokenizer, f"What is 2 {name}\n{name} + 3?")
        assert [i for i in hostile if i in special] == [i for i in plain if i in special], name
        assert tokenizer.decode(hostile, skip_special_tokens=True).count(name) == 2


def test_a_turn_ends_with_the_template_s_token_though_it_is_special_there_alone():
    tokenizer = load_tokenizer(ModelConfig())
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert ending_tokens(tokenizer, None) == [end, tokenizer.eos_token_id]


@pytest.mark.parametrize("family", FAMILIES)
def test_other_problems_are_tokenized_as_the_template_s_text_is(folders, family):
    tokenizer = load_tokenizer(ModelConfig(path=str(folders[family])))
    question = "What is 2 + 3? Show how.\n< | im_end"
    whole = tokenizer(chat_prompt(tokenizer, question), add_special_tokens=False).input_ids
    assert ids_of(tokenizer, question) == whole
    assert chat_prompt(tokenizer, PLACE).count(PLACE) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gold_solution_ends_at_its_end_alone(folders, family):
    tokenizer = load_tokenizer(ModelConfig(path=str(folders[family])))
    end = tokenizer.eos_token_id
    ids = encode_response(tokenizer, f"2 + 3 = {tokenizer.eos_token} 5", end)
    assert ids.index(end) == len(ids) - 1
    assert tokenizer.eos_token in tokenizer.decode(ids[:-1])
