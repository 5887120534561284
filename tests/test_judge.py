"""A judge's scores are read strictly, averaged, and measured against the answers that the method does not see."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from irpo_utils.extras import judge
from irpo_utils.methods import sampler
from irpo_utils.model import sampling
from irpo_utils.model.prompts import encode_prompts
from irpo_utils.model.sampling import Completion
from irpo_utils.tasks.base import Problem


def judging(config, **settings):
    return config.but(judge=config.judge.but(**({"read": "text"} | settings)))


def sample(problem, response, reward):
    return {
        "problem": problem,
        "response": response,
        "token_ids": [4, 2],
        "finished": True,
        "reward": reward,
        "logp": -1.0,
    }


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Two points.\nScore: 4", 4), ("Score: 1\nNo, the last step is right. Score: 3.", 3), ("Score:5", 5), ("Score: 0\n", 0),
        ("Score: 10", None), ("Score: 4.5", None), ("Score: 4/5", None), ("Score: -1", None), ("Score: 6", None),
        ("Score: 3 and then Score: 9", None), ("Score: n", None), ("4", None), ("", None),
    ],
)  # fmt: skip
def test_a_score_is_the_last_one_and_read_strictly(text, score):
    assert judge.read_score(text) == score


class Words:
    """A tokenizer that writes every word as a token of its own."""

    chat_template, eos_token_id, unk_token_id = None, 0, None

    def __init__(self):
        self.words = ["<end>"]

    def __call__(self, text, **options):
        self.words += [w for w in dict.fromkeys(text.split(" ")) if w not in self.words]
        return type("Ids", (), {"input_ids": [self.words.index(w) for w in text.split(" ")]})

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)


def test_judgements_are_averaged_over_those_that_parse(config):
    """By hand: three judgements of each distinct response; "a" twice and "a" for another problem."""
    tokenizer, seen = Words(), {}
    said = {
        ("p", "a"): ["Score: 5", "Score: 4", "well"],
        ("p", "b"): ["Score: 1", "Score: 2", "Score: 0"],
        ("p", "c"): ["no", "Score: 9", ""],
        ("q", "a"): ["Score: 3", "Score: 3", "Score: 3"],
    }
    problems = [Problem("p", "How many? {x}", "1"), Problem("q", "Where?", "2")]
    samples = [sample("p", "a", 1.0), sample("p", "b", 0.0), sample("q", "a", None), sample("p", "a", 1.0), sample("p", "c", 1.0)]  # fmt: skip

    def draw(prompts, *, n, temperature, seed, eos_id, max_new_tokens, rows, progress):
        assert (n, temperature, seed, eos_id, max_new_tokens) == (3, 0.9, 7, [0, 2], 99)
        for (name, ids), replies in zip(prompts.items(), said.values(), strict=True):
            seen[name] = tokenizer.decode(ids)
            yield {name: [Completion([*tokenizer(r).input_ids, 0], -1.0, True) for r in replies]}

    judged, facts = judge.judge(judging(config, samples=3, temperature=0.9, max_new_tokens=99), draw, tokenizer, problems, samples, 7)  # fmt: skip
    assert [s["reward"] for s in judged] == [4.5, 1.0, 3.0, 4.5, None]
    assert [s["answer_reward"] for s in judged] == [1.0, 0.0, None, 1.0, 1.0] == [s["reward"] for s in samples]
    assert (facts["responses"], facts["judgements"], facts["readable"], facts["unscored"]) == (4, 12, 8 / 12, 1)
    assert facts["auc"] == 1 and facts["ranked"] == 1  # 4.5 twice, against 1 and, in the other problem, 3
    assert list(seen) == [
        "p/judge/0",
        "p/judge/1",
        "p/judge/2",
        "q/judge/0",
    ]  # a problem's own, whatever else is judged
    texts = list(seen.values())
    assert "How many? {x}" in texts[0] and "Where?" in texts[3] and all(t.endswith("Score: n\n") for t in texts)
    with pytest.raises(ValueError, match="needs a function that draws"):
        judge.judge(judging(config), None, tokenizer, problems, samples, 0)


def test_what_the_judge_is_worth_is_said():
    rows = lambda score: [sample(f"p{i // 3}", "a", float(i % 3 == 0)) | {"answer_reward": float(i % 3 == 0), "reward": score(i)} for i in range(60)]  # noqa: E731  # fmt: skip
    good = judge.agreement(rows(lambda i: 4.0 if i % 3 == 0 else i % 5))
    assert not good["too_small"] and good["verdict"].startswith("the judge tells right from wrong: AUC 0.")
    blind = judge.agreement(rows(lambda i: i % 5))
    assert blind["too_small"] and "cannot tell right from wrong" in blind["verdict"]
    assert "prefers wrong to right: AUC 0.000" in judge.agreement(rows(lambda i: i % 3))["verdict"]
    # Scores that know easy problems from hard ones, and nothing of the responses.
    hard = [sample("", "a", None) | {"problem": f"p{i}", "answer_reward": float(j < i % 4), "reward": i % 4} for i in range(60) for j in range(4)]  # fmt: skip
    only = judge.agreement(hard)
    assert only["auc_low"] > 0.6 and only["ranked"] == 0.5 and only["too_small"] and "cannot tell" in only["verdict"]
    assert judge.agreement(rows(lambda i: None))["verdict"] == "no judgement could be read"
    assert judge.agreement(rows(lambda i: 1.0)[:1])["too_small"]


@pytest.fixture(scope="module")
def samples(config, seed_model, tokenizer, task):
    draw, problems = partial(sampling.sample, seed_model), task.problems("train")[:12]
    batches = sampler.graded_samples(config, draw, tokenizer, task, problems, n=8, temperature=1.0, seed=0, label="")
    return problems, [row for batch in batches for row in batch]


def test_scores_are_drawn_from_the_model_s_own_probabilities_of_the_six(config, seed_model, tokenizer, task, samples):
    problems, rows = samples
    many = judging(config, read="scores", samples=4000, temperature=1.5)
    judged, facts = judge.judge(many, None, tokenizer, problems, rows, 0, model=seed_model)
    one = judged[5]
    text = judge.judge_prompt(next(p for p in problems if p.id == one["problem"]).question, one["response"], "scores")
    ids = tokenizer(text).input_ids + tokenizer("Score:", add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = seed_model(torch.tensor([ids])).logits[0, -1]
    likely = (logits[[tokenizer.convert_tokens_to_ids(f" {n}") for n in range(6)]] / 1.5).softmax(-1).numpy()
    mean, spread = likely @ np.arange(6), np.sqrt(likely @ np.arange(6) ** 2 - (likely @ np.arange(6)) ** 2)
    assert one["reward"] == pytest.approx(mean, abs=4 * spread / np.sqrt(4000))
    assert facts["readable"] == 1 and facts["unknown_tokens"] > 0.4 * facts["prompt_tokens"]
    again = judging(config, read="scores")
    runs = [judge.judge(again, None, tokenizer, problems, part, 3, model=seed_model)[0] for part in (rows, rows)]
    assert runs[0] == runs[1] and len({s["reward"] for s in runs[0]}) > 3
    with pytest.raises(ValueError, match="scores needs the model"):
        judge.judge(again, None, tokenizer, problems, rows, 3)


def test_a_model_that_cannot_judge_in_words_leaves_samples_without_a_reward(
    config, seed_model, tokenizer, task, samples
):
    problems, rows = samples
    judged, facts = judge.judge(judging(config, max_new_tokens=24), partial(sampling.sample, seed_model), tokenizer, problems, rows, 0)  # fmt: skip
    assert facts["readable"] == 0 and all(s["reward"] is None for s in judged)
    assert facts["too_small"] and facts["verdict"] == "no judgement could be read"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_scores_through_a_chat_template(config, family, tmp_path):
    from small_models import FAMILIES, build
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = build(family, tmp_path / family, ["How many points does it earn? Score: 1 Score: 2"] * 9)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    head, rests = judge.score_tokens(tokenizer)
    assert [tokenizer.decode(head + r) for r in rests] == [f"Score: {n}" for n in range(6)]
    asked, whole = [], encode_prompts
    problems = [Problem("p", "How many?", "1")]
    chat = judging(config, read="scores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "encode_prompts", lambda *a: asked.append(whole(*a)) or asked[0])
        judged, _ = judge.judge(chat, None, tokenizer, problems, [sample("p", "two", 1.0)], 0, model=model)
    text = tokenizer.decode(next(iter(asked[0].values())))
    assert text.count("Reply:\ntwo") == 1 and text.endswith(
        ("assistant<|end_header_id|>\n\n", "assistant\n", "model\n")
    )
    assert text.count(FAMILIES[family][0] or "no BOS") == bool(FAMILIES[family][0]) and 0 <= judged[0]["reward"] <= 5


def test_a_tokenizer_that_knows_no_numbers_is_refused():
    class Blind(Words):
        def __call__(self, text, **options):
            return type("Ids", (), {"input_ids": [3, 3]})

    with pytest.raises(ValueError, match="cannot tell the scores apart.*set recipes.read=text"):
        judge.score_tokens(Blind())
