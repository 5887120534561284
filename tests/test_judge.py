"""A judge's scores are read strictly, averaged, and measured against the answers that the method does not see."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from small_models import FAMILIES, build
from transformers import AutoTokenizer

from irpo_utils.extras import judge
from irpo_utils.methods.rewards import Job
from irpo_utils.methods.sampler import Draw, Sampler, opened
from irpo_utils.model.prompts import encode_prompts, stop_ids
from irpo_utils.model.records import Sample
from irpo_utils.model.sampling import Completion
from irpo_utils.tasks.base import Problem


def judging(config, **settings):
    return config.but(judge=config.judge.but(**({"read": "text"} | settings)))


def sample(problem, response, reward):
    return Sample(problem, 0, response, None, reward, reward, True, -1.0, (4, 2))


@pytest.fixture
def job(tmp_path):
    """Makes a job as the reward stage does, each with its own folder; the judge's random numbers come from `seed`."""
    made = []

    def make(kind, config, problems, samples, seed, **more):
        made.append(tmp_path / f"job_{len(made)}")
        by_problem = Sample.by_problem(samples)
        return kind(config, None, None, problems, {}, by_problem, 1.0, seed - judge.SEED, made[-1], **more)

    return make


@dataclass(frozen=True)
class Scripted(Job):
    """A job whose sampler draws what a test gives it."""

    draw: Draw = None
    tokenizer: Any = None

    def sampler(self, config=None, task=None, problems=None):
        return nullcontext(Sampler(self.draw, self.tokenizer, task, stop_ids(config.model, self.tokenizer), config))


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Two points.\nScore: 4", 4), ("Score: 1\nNo, the last step is right. Score: 3.", 3),
        ("Score:5", 5), ("Score: 0\n", 0),
        ("Score: 10", None), ("Score: 4.5", None), ("Score: 4/5", None), ("Score: -1", None), ("Score: 6", None),
        ("Score: 3 and then Score: 9", None), ("Score: n", None), ("4", None), ("", None),
    ],
)  # fmt: skip
def test_a_score_is_the_last_one_and_read_strictly(text, score):
    assert judge.read_score(text) == score


class Words:
    """A tokenizer that writes every word as a token of its own."""

    chat_template, eos_token_id, unk_token_id = None, 0, None
    added_tokens_decoder = {}  # noqa: RUF012 (of a stand-in)

    def __init__(self):
        self.words = ["<end>"]

    def __call__(self, text, **options):
        self.words += [w for w in dict.fromkeys(text.split(" ")) if w not in self.words]
        return type("Ids", (), {"input_ids": [self.words.index(w) for w in text.split(" ")]})

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)


def test_judgements_are_averaged_over_those_that_parse(config, job):
    """By hand: three judgements of each distinct response; "a" twice and "a" for another problem."""
    tokenizer, seen = Words(), {}
    judgements = {
        "p/judge/0": ["Score: 5", "Score: 4", "well"],
        "p/judge/1": ["Score: 1", "Score: 2", "Score: 0"],
        "p/judge/2": ["no", "Score: 9", ""],
        "q/judge/0": ["Score: 3", "Score: 3", "Score: 3"],
    }
    problems = [Problem("p", "How many? {x}", "1"), Problem("q", "Where?", "2")]
    p, q = (
        [sample("p", "a", 1.0), sample("p", "b", 0.0), sample("p", "a", 1.0), sample("p", "c", 1.0)],
        [sample("q", "a", None)],
    )

    def draw(prompts, *, n, temperature, seed, eos_id, max_new_tokens, max_rows, greedy_too, progress):
        assert (n, temperature, seed, eos_id, max_new_tokens) == (3, 0.9, 7, [0, 2], 99)
        assert prompts.keys() == judgements.keys()
        for name, ids in prompts.items():
            seen[name] = tokenizer.decode(ids)
            yield {name: [Completion([*tokenizer(r).input_ids, 0], -1.0, True) for r in judgements[name]]}

    settings = judging(config, samples=3, temperature=0.9, max_new_tokens=99)
    judged, facts = judge.judged(job(Scripted, settings, problems, p + q, 7, draw=draw, tokenizer=tokenizer))
    assert [s.reward for s in judged] == [4.5, 1.0, 4.5, None, 3.0]
    assert [s.answer_reward for s in judged] == [1.0, 0.0, 1.0, 1.0, None] == [s.reward for s in p + q]
    assert [replace(s, reward=s.answer_reward) for s in judged] == p + q
    assert (facts["responses"], facts["judgements"], facts["readable"], facts["unscored"]) == (4, 12, 8 / 12, 1)
    assert facts["auc"] == 1 and facts["ranked"] == 1  # 4.5 twice, against 1 and, in the other problem, 3
    # A problem's own, whatever else is judged.
    assert sorted(seen) == ["p/judge/0", "p/judge/1", "p/judge/2", "q/judge/0"]
    mixed = judge.judge_questions(problems, [p[0], p[1], q[0], p[2], p[3]], "text")
    assert [question.id for question in mixed.values()] == sorted(seen)
    texts = [seen[name] for name in sorted(seen)]
    assert "How many? {x}" in texts[0] and "Where?" in texts[3] and all(t.endswith("Score: n\n") for t in texts)


def test_what_the_judge_is_worth_is_said():
    def rows(score):
        return [replace(sample(f"p{i // 3}", "a", float(i % 3 == 0)), reward=score(i)) for i in range(60)]

    good = judge.agreement(rows(lambda i: 4.0 if i % 3 == 0 else i % 5))
    assert not good["too_small"] and good["verdict"].startswith("the judge tells right from wrong: AUC 0.")
    blind = judge.agreement(rows(lambda i: i % 5))
    assert blind["too_small"] and "cannot tell right from wrong" in blind["verdict"]
    assert "prefers wrong to right: AUC 0.000" in judge.agreement(rows(lambda i: i % 3))["verdict"]
    # Scores that know easy problems from hard ones, and nothing of the responses.
    hard = [replace(sample(f"p{i}", "a", float(j < i % 4)), reward=i % 4) for i in range(60) for j in range(4)]
    only = judge.agreement(hard)
    assert only["auc_low"] > 0.6 and only["ranked"] == 0.5 and only["too_small"] and "cannot tell" in only["verdict"]
    # Of one problem with both kinds of response an interval would be certain, and is not to be believed.
    apart = [replace(sample(f"p{i}", "a", float(i % 2)), reward=3.0 * (i % 2)) for i in range(60) for _ in range(2)]
    few = judge.agreement([*apart, *rows(lambda i: 4.0 if i % 3 == 0 else 1.0)[:3]])
    assert few["ranked_low"] == 1 and few["too_small"] and few["verdict"].startswith("too few problems (1)")
    assert judge.agreement(rows(lambda i: None))["verdict"] == "no judgement could be read"
    assert judge.agreement(rows(lambda i: 1.0)[:1])["too_small"]


@pytest.fixture(scope="module")
def samples(config, task):
    problems = task.problems("train")[:12]
    with opened(config, None, task, problems) as sampler:
        batches = sampler.samples(problems, n=8, temperature=1.0, seed=0, label="")
        return problems, [s for batch in batches for s in batch]


def test_scores_are_drawn_from_the_model_s_own_probabilities_of_the_six(config, seed_model, tokenizer, samples, job):
    problems, drawn = samples
    many = judging(config, read="scores", samples=4000, temperature=1.5)
    judged, facts = judge.judged(job(Job, many, problems, drawn, 0))
    one = judged[5]
    text = judge.judge_prompt(next(p for p in problems if p.id == one.problem).question, one.response, "scores")
    ids = tokenizer(text).input_ids + tokenizer("Score:", add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = seed_model(torch.tensor([ids])).logits[0, -1]
    likely = (logits[[tokenizer.convert_tokens_to_ids(f" {n}") for n in range(6)]] / 1.5).softmax(-1).numpy()
    mean, spread = likely @ np.arange(6), np.sqrt(likely @ np.arange(6) ** 2 - (likely @ np.arange(6)) ** 2)
    assert one.reward == pytest.approx(mean, abs=4 * spread / np.sqrt(4000))
    assert facts["readable"] == 1 and facts["unknown_tokens"] > 0.3 * facts["prompt_tokens"]
    again = judging(config, read="scores")
    runs = [judge.judged(job(Job, again, problems, drawn, 3))[0] for _ in range(2)]
    assert runs[0] == runs[1] and len({s.reward for s in runs[0]}) > 3


def test_nothing_is_written_for_scores_by_probability(config, tokenizer, samples, job):
    """So no other engine is started either."""
    problems, drawn = samples

    def draw(*_, **__):
        raise AssertionError("nothing is to be drawn")

    mute = {"draw": draw, "tokenizer": tokenizer}
    judged, _ = judge.judged(job(Scripted, judging(config, read="scores"), problems, drawn, 3, **mute))
    assert all(0 <= s.reward <= 5 for s in judged)
    with pytest.raises(AssertionError, match="nothing is to be drawn"):
        judge.judged(job(Scripted, judging(config, read="text"), problems, drawn, 3, **mute))


def test_a_model_that_cannot_judge_in_words_leaves_samples_without_a_reward(config, samples, job):
    problems, drawn = samples
    judged, facts = judge.judged(job(Job, judging(config, max_new_tokens=24), problems, drawn, 0))
    assert facts["readable"] == 0 and all(s.reward is None for s in judged)
    assert facts["too_small"] and facts["verdict"] == "no judgement could be read"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_scores_through_a_chat_template(config, job, family, tmp_path, monkeypatch):
    folder = build(family, tmp_path / family, ["How many points does it earn? Score: 1 Score: 2"] * 9)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    head, rests = judge.score_tokens(tokenizer)
    assert [tokenizer.decode(head + r) for r in rests] == [f"Score: {n}" for n in range(6)]
    encoded = []

    def watched(*arguments):
        encoded.append(encode_prompts(*arguments))
        return encoded[-1]

    monkeypatch.setattr(judge, "encode_prompts", watched)
    chat = judging(config, read="scores").but(model=config.model.but(path=str(folder)))
    judged, _ = judge.judged(job(Job, chat, [Problem("p", "How many?", "1")], [sample("p", "two", 1.0)], 0))
    text = tokenizer.decode(next(iter(encoded[0].values())))
    assert text.count("Reply:\ntwo") == 1 and text.endswith(
        ("assistant<|end_header_id|>\n\n", "assistant\n", "model\n")
    )
    assert text.count(FAMILIES[family][0] or "no BOS") == bool(FAMILIES[family][0]) and 0 <= judged[0].reward <= 5


def test_a_tokenizer_that_knows_no_numbers_is_refused():
    class Blind(Words):
        def __call__(self, text, **options):
            return type("Ids", (), {"input_ids": [3, 3]})

    with pytest.raises(ValueError, match="cannot tell the scores apart.*set judge.read=text"):
        judge.score_tokens(Blind())
