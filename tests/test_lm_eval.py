"""lm-eval, where it is installed, gives an exported model the number that it has here, by the blocks of the page."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, drive
from transformers import AutoModelForCausalLM, AutoTokenizer

from irpo_utils.methods.sampler import Sampler
from irpo_utils.run.config import read_config
from irpo_utils.tasks import get_task

PAGE = (ROOT / "irpo_utils" / "site" / "pages" / "own_data.md").read_text().partition("## Its number from lm-eval")[2]


def test_lm_eval_gives_the_number_that_the_sampler_gives(micro_run, tmp_path):
    pytest.importorskip("lm_eval")
    run, _ = micro_run
    whole, python, task_file, command = (
        re.search(pattern, PAGE, re.DOTALL)[1]
        for pattern in (
            r"(\./run_all\.sh export[^\n]*)",
            r"```python\n(.*?)```",
            r"```yaml\n(.*?)```",
            r"\n(lm_eval .*?)```",
        )
    )

    def here(text):
        return (
            text.replace("outputs/mine", str(run))
            .replace("outputs/lm_eval", str(tmp_path))
            .replace(" mine ", f" {run.name} ")
            .replace("max_gen_toks: 256", f"max_gen_toks: {config.sampling.max_new_tokens}")
        )

    config = read_config(run / "config.yaml")
    assert drive(*shlex.split(here(whole))[1:]).returncode == 0
    exec(here(python), {})
    (tmp_path / "task.yaml").write_text(here(task_file))
    words = shlex.split(here(command).replace("\\\n", " "))
    done = subprocess.run(
        [sys.executable, "-m", *words, "--device", "cpu"],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "results").rglob("results*.json")
    number = json.loads(results.read_text())["results"]["irpo_problems"]["exact_match,marked"]
    (samples,) = (tmp_path / "results").rglob("samples*.jsonl")
    texts = {row["doc"]["prompt"]: row["resps"][0][0] for row in map(json.loads, samples.read_text().splitlines())}

    task = get_task(config.task)
    problems, folder = task.problems("test"), tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sampler = Sampler.of(model, AutoTokenizer.from_pretrained(folder), task, config)
    drawn = [s for part in sampler.samples(problems, n=1, temperature=0, seed=0, label="test") for s in part]
    assert number == sum(s.reward == 1 for s in drawn) / len(problems)
    prompts = {p.id: task.prompt(p) for p in problems}
    assert {prompts[s.problem]: s.response for s in drawn} == texts
