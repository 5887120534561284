"""Process feedback: where steps end, what simulation labels them, and a reward model that reads what it should."""

import hashlib
import json
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_models import build
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from irpo_utils import files, metrics
from irpo_utils.extras.process import labels, reward_model, simulation, truth
from irpo_utils.methods import sampler
from irpo_utils.methods.rewards import Job
from irpo_utils.model import load, logprobs, sampling
from irpo_utils.model.prompts import encode_response
from irpo_utils.model.records import Sample
from irpo_utils.tasks.stories import Event, Story, make_problem


@pytest.fixture(scope="module")
def merging():
    """A byte-level BPE tokenizer whose tokens run over the ends of lines, and which has one for every byte."""
    bpe = Tokenizer(kinds.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    texts = ["a.\nb = a\n\n    a.\n", "\n\nb\na.\n\n", "   \n    b.\n"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def test_steps_of_a_solution_end_with_its_lines(tokenizer):
    text = "12 / 2 = 6\n6 + 3 = 9\nFinal answer: odd"
    ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    ends = labels.step_ends(tokenizer, ids)
    texts = [tokenizer.decode(ids[: end + 1]) for end in ends]
    assert texts == ["12 / 2 = 6\n", "12 / 2 = 6\n6 + 3 = 9\n", text]
    assert labels.step_ends(tokenizer, ids[:-3], finished=False) == ends[:2]  # the last line was cut: no step
    assert labels.step_ends(tokenizer, [tokenizer.eos_token_id]) == []


def test_empty_lines_are_no_steps_of_code(merging):
    code = "def f(a):\n\n    b = a\n    \n\n    return b\n"
    for ids in (merging(code).input_ids, [merging(c).input_ids[0] for c in code]):
        texts = [merging.decode(ids[: end + 1]) for end in labels.step_ends(merging, ids, finished=False)]
        assert [len(text.split("\n")) > 1 and text.strip().rpartition("\n")[2].strip() for text in texts] == [
            "def f(a):",
            "b = a",
            "return b",
        ]


@given(st.text("ab.= \n", min_size=1, max_size=30), st.booleans())
@example("\n\nb\n", True)  # which may be one token
def test_every_line_is_whole_in_the_prefix_of_its_step(merging, text, merged):
    ids = merging(text).input_ids if merged else [merging(c).input_ids[0] for c in text]
    ends = labels.step_ends(merging, [*ids, 0])
    prefixes = [merging.decode(ids[: end + 1]) for end in ends]
    lines = [line for line in text.split("\n") if line.strip()]

    def whole(prefix):
        lines = prefix.split("\n")
        return sum(bool(line.strip()) for line in (lines if prefix == text else lines[:-1]))

    counts = [whole(prefix) for prefix in prefixes]
    assert counts == sorted(set(counts)) and (counts[-1] if counts else 0) == len(lines)
    if not merged:
        assert counts == list(range(1, len(lines) + 1))


def test_path_rewards_by_hand():
    scores = [0.5, 0.8, 0.2]
    wanted = {"mean": 0.5, "min": 0.2, "product": 0.08, "last": 0.2}
    assert {how: labels.path_reward(scores, how) for how in labels.PATHS} == pytest.approx(wanted)
    assert labels.path_reward([], "mean") == 0


@given(st.text("01", min_size=1, max_size=16), st.integers(0, 8), st.integers(1, 16))
def test_more_is_asked_of_a_step_by_a_larger_delta_and_less_by_more_continuations(outcomes, delta, k):
    assert labels.label(outcomes, delta, k) >= labels.label(outcomes, delta + 1, k)
    assert labels.label(outcomes, delta, k) <= labels.label(outcomes, delta, k + 1)
    assert labels.label(outcomes, delta) == (outcomes.count("1") > delta)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=20))
def test_auc_is_the_share_of_ordered_pairs(rows):
    right, wrong = [s for s, y in rows if y], [s for s, y in rows if not y]
    found = metrics.auc([s for s, _ in rows], [int(y) for _, y in rows])
    if not right or not wrong:
        assert found is None
    else:
        ordered = sum((a > b) + (a == b) / 2 for a in right for b in wrong)
        assert found == pytest.approx(ordered / len(right) / len(wrong))


@pytest.fixture(scope="module")
def small(config):
    """A configuration that labels and trains in seconds."""
    parts = {"continuations": 4, "max_steps": 6, "batch": 8}
    return config.but(process=config.process.but(**parts), sampling=config.sampling.but(max_rows=64))


@pytest.fixture(scope="module")
def job(small, task, tmp_path_factory):
    """Four samples of eight problems; the continuations' seed is 5."""
    problems, samples = task.problems("train")[:8], {}
    with sampler.opened(small, None, task, problems) as policy:
        for s in (s for batch in policy.samples(problems, n=4, temperature=1.0, seed=0, label="") for s in batch):
            samples.setdefault(s.problem, []).append(s)
        prompts = policy.prompts(problems)
    return Job(small, None, task, problems, prompts, samples, 1.0, 5, tmp_path_factory.mktemp("labels"))


@pytest.fixture(scope="module")
def labelled(job):
    return labels.label_steps(job)


@pytest.fixture
def no_model(monkeypatch):
    """A test in which no policy may be loaded, so that nothing can be drawn."""
    monkeypatch.setattr(sampler, "load_policy", None)


def test_labels_are_those_of_continuations_drawn_one_prefix_at_a_time(labelled, tokenizer, task, job, seed_model):
    by_id, seen = {p.id: p for p in job.problems}, 0
    for row in labelled[::3]:
        for end, outcomes in zip(row.ends, row.outcomes, strict=True):
            start = list(row.token_ids[: end + 1])
            if not outcomes:
                continue
            batches = sampling.sample(
                seed_model,
                {row.problem: list(row.prompt_ids)},
                n=4,
                temperature=1.0,
                seed=5,
                eos_id=[2],
                max_new_tokens=64,
                starts={row.problem: [start]},
            )
            texts = [tokenizer.decode(c.token_ids[:-1]) for c in next(batches)[row.problem]]
            right = [task.extract(text, by_id[row.problem]) == by_id[row.problem].answer for text in texts]
            assert outcomes == "".join("01"[ok] for ok in right)
            seen += 1
    assert seen > 5


def test_labels_of_last_steps_and_gold_solutions_need_no_simulation(labelled, job):
    assert {row.problem for row in labelled if row.gold} <= {p.id for p in job.problems}
    for row in labelled:
        assert len(row.ends) == len(row.labels) == len(row.outcomes)
        if row.gold:
            assert set(row.labels) == {1} and set(row.outcomes) == {""}
        else:
            assert row.labels[-1] == (row.answer_reward == 1) and row.outcomes[-1] == ""
            assert all(len(o) == 4 for o in row.outcomes[:-1])
            assert list(row.labels[:-1]) == [int("1" in o) for o in row.outcomes[:-1]]


def test_solutions_are_written_and_read(labelled, tmp_path):
    file = tmp_path / "labels.jsonl"
    reward_model.Solution.write(file, labelled)
    assert reward_model.Solution.read(file, "01b_reward") == labelled
    fields = ["problem", "prompt_ids", "token_ids", "gold", "finished", "answer_reward", "ends", "labels", "outcomes"]
    assert all(list(row) == fields for row in files.read_jsonl(file))


def test_a_killed_simulation_goes_on(labelled, job, monkeypatch):
    again = replace(job, folder=job.folder / "again")
    monkeypatch.setattr(simulation, "CHUNK", 1)
    assert labels.label_steps(again) == labelled  # however it is cut
    chunks = sorted(again.folder.glob("continuations_*.jsonl"))
    assert len(chunks) > 1
    before = chunks[0].stat().st_mtime_ns
    chunks[-1].unlink()
    assert labels.label_steps(again) == labelled
    assert chunks[0].stat().st_mtime_ns == before and chunks[-1].exists()
    monkeypatch.setattr(sampler, "load_policy", None)  # nothing is left to draw
    assert labels.label_steps(again) == labelled


def test_the_control_labels_every_step_with_the_answer(small, job, no_model, tmp_path):
    control = small.but(process=small.process.but(labels="outcome"))
    for row in labels.label_steps(replace(job, config=control, folder=tmp_path)):
        assert set(row.labels) == {int(row.answer_reward == 1)}


def test_another_simulator_reads_prefixes_as_text(small, tokenizer, job, tmp_path, monkeypatch):
    """One with its own tokenizer and chat template; it is given what the policy's own sampler would be given."""
    other = build("qwen2", tmp_path / "other", [p.question + p.solution for p in job.problems])
    config = small.but(process=small.process.but(simulator=str(other)))
    starts, reader = {}, load.load_tokenizer(small.model.but(path=str(other)))
    real = sampling.sample

    def watched(model, prompts, **settings):
        starts.update(settings["starts"])
        return real(model, prompts, **settings)

    monkeypatch.setattr(sampler, "sample", watched)
    text = "12 / 2 = 6\n"
    ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    problem = job.problems[0].id
    own = replace(job, config=config, folder=tmp_path, seed=0)
    found = simulation.simulate(own, tokenizer, {problem: [ids]})
    assert [reader.decode(start) for start in starts[problem]] == [text]
    assert found == {(problem, ids): "0000"}  # random weights
    nobody = small.but(process=small.process.but(simulator="/no/such/model"))
    with pytest.raises(ValueError, match=r"process\.simulator: /no/such/model is no folder"):
        simulation.simulate(replace(own, config=nobody), tokenizer, {problem: [ids]})


def test_another_adapter_continues_on_the_policy_s_own_tokens(small, tokenizer, job, tmp_path):
    (tmp_path / "adapter_config.json").touch()
    config = small.but(process=small.process.but(simulator=str(tmp_path)))
    own, reader = simulation.simulator(replace(job, config=config), tokenizer)
    assert (own.policy, own.config, reader) == (tmp_path, config, tokenizer)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_scores_are_those_of_each_response_alone_through_the_model_itself(tuning, small, labelled):
    """transformers' own forward on prompt + response, unpadded and unshared, read at the token that ends the step."""
    config = small.but(model=small.model.but(tuning=tuning))
    model = reward_model.load_reward_model(config, seed=1)
    torch.manual_seed(0)
    for name, weights in model.named_parameters():
        if "lora_B" in name or "score" in name:
            torch.nn.init.normal_(weights, std=0.3)
    rows = [row for row in labelled if row.ends][:12]
    found = reward_model.score(model, rows, max_rows=5)
    spread = set()
    for row, scores in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.prompt_ids + row.token_ids])).logits[0].softmax(-1)
        wanted = logits[[len(row.prompt_ids) + end for end in row.ends], 1].tolist()
        assert scores == pytest.approx(wanted, abs=1e-5)
        spread.update(round(s, 2) for s in scores)
    assert len(spread) > 5


@pytest.fixture
def kept(monkeypatch):
    """What a reward model that was just trained says of the solutions, before it is saved."""
    scores, real = [], reward_model.held_out_facts

    def watched(model, solutions, held_out):
        scores.append(reward_model.score(model, solutions))
        return real(model, solutions, held_out)

    monkeypatch.setattr(reward_model, "held_out_facts", watched)
    return scores


def loaded_scores(config, rows, folder):
    model = reward_model.load_reward_model(config, folder / "reward_model")
    return reward_model.score(model, [row for row in rows if row.ends])


def test_a_killed_training_goes_on_and_ends_the_same(small, labelled, tmp_path, monkeypatch):
    monkeypatch.setattr(reward_model, "SAVE_EVERY", 2)
    whole = reward_model.train(small, labelled, tmp_path / "whole", 3)
    real, steps = reward_model.step_logits, []

    def killed(model, batch):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(model, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reward_model, "step_logits", killed)
        reward_model.train(small, labelled, tmp_path / "killed", 3)
    assert (tmp_path / "killed" / "checkpoints" / "checkpoint-2" / "complete").exists()
    assert reward_model.train(small, labelled, tmp_path / "killed", 3) == whole
    file = "reward_model/adapter_model.safetensors"
    assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_head_in_float32_is_loaded_as_it_was_saved_on_a_base_in_16_bits(tuning, small, labelled, tmp_path):
    config = small.but(model=small.model.but(tuning=tuning, dtype="bfloat16"))
    reward_model.train(config, labelled, tmp_path, 3)
    saved = {}
    for file in (tmp_path / "reward_model").glob("*.safetensors"):
        saved |= {k: v for k, v in load_file(file).items() if "score" in k and v.dim() == 2}
    head = reward_model.head_of(reward_model.load_reward_model(config, tmp_path / "reward_model"))
    weight = next(p for name, p in head.named_parameters() if p.dim() == 2 and "original" not in name)
    assert weight.dtype == torch.float32 and torch.equal(weight, next(iter(saved.values())))
    assert not torch.equal(weight, weight.bfloat16().float())  # it has bits that 16 would not hold


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_reward_model_is_saved_and_loaded_and_the_same_again(tuning, small, labelled, tmp_path, kept):
    config = small.but(model=small.model.but(tuning=tuning))
    facts = reward_model.train(config, labelled, tmp_path / "a", 3)
    assert facts["held_out_steps"] > 0 and 0 <= facts["held_out_accuracy"] <= 1 and facts["steps"] == 6
    assert facts == json.loads((tmp_path / "a" / "reward_model" / "facts.json").read_text())
    assert loaded_scores(config, labelled, tmp_path / "a") == kept[0]
    assert facts == reward_model.train(config, labelled, tmp_path / "b", 3)
    digests = [
        {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / run / "reward_model").iterdir()}
        for run in "ab"
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(("family", "quantize"), [("qwen2", "nf4"), ("gemma2", "none")])
def test_reward_models_of_other_kinds(family, quantize, small, job, task, tmp_path, kept):
    """With their own tokenizer; a head that is not quantized and has no adapter."""
    path = build(family, tmp_path / "base", [p.question + p.solution for p in job.problems])
    config = small.but(model=small.model.but(path=str(path), quantize=quantize))
    with sampler.opened(config, None, task, job.problems) as policy:
        prompts = policy.prompts(job.problems)
    gold = replace(job, config=config, prompts=prompts, samples={}, folder=tmp_path, seed=0)
    rows = labels.label_steps(gold)  # the gold solutions
    assert all(row.gold for row in rows) and len(rows) == len(job.problems)
    reward_model.train(config, rows, tmp_path, 0)
    assert loaded_scores(config, rows, tmp_path) == [pytest.approx(scores, abs=1e-6) for scores in kept[0]]
    new = reward_model.load_reward_model(config, seed=0)
    assert {p.dtype for p in reward_model.head_of(new).parameters()} == {torch.float32}
    trained = {name for name, p in new.named_parameters() if p.requires_grad}
    assert sum("score" in name for name in trained) == 2 and any("lora_A" in name for name in trained)


def test_a_reward_model_learns_what_can_be_told(small, labelled, tmp_path):
    """Labels that the state at a step's end has for certain: whether the step is the last one."""
    rows = [replace(row, labels=(*[0] * (len(row.ends) - 1), 1)) for row in labelled if row.ends]
    config = small.but(process=small.process.but(max_steps=60, max_epochs=60))
    facts = reward_model.train(config, rows, tmp_path, 0)
    assert facts["held_out_accuracy"] > 0.95 and facts["held_out_auc"] > 0.98


def test_no_reward_model_and_too_few_problems_say_so(small, labelled, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no reward model"):
        reward_model.load_reward_model(small, tmp_path)
    one = [row for row in labelled if row.problem == labelled[0].problem]
    without_steps = [replace(row, ends=(), labels=()) for row in labelled if row.problem != labelled[0].problem]
    for rows in (one, one + without_steps):
        with pytest.raises(ValueError, match="at least two problems"):
            reward_model.train(small, rows, tmp_path, 0)


def test_states_have_read_what_the_docstring_says(seed_model):
    prompt, response = [1, 5, 6, 7], [8, 9, 10]
    with torch.no_grad():
        wanted = seed_model.base_model(torch.tensor([prompt + response])).last_hidden_state[0]
        batch = logprobs.collate([(prompt, response), (prompt, response[:1])])
        for states in (logprobs.response_states, logprobs.tree_states, logprobs.padded_states):
            assert torch.allclose(states(seed_model, batch)[0], wanted[len(prompt) - 1 : -1], atol=1e-4)


def test_feedback_end_to_end(small, job, tmp_path):
    first = job.problems[0].id
    unfinished = replace(job.samples[first][0], finished=False, reward=None, answer_reward=None, token_ids=(5, 6))
    samples = {**job.samples, first: [*job.samples[first], unfinished]}
    own = replace(job, samples=samples, folder=tmp_path, seed=5 - labels.SEED)
    scored, facts = labels.process(own)
    drawn = [s for of_problem in samples.values() for s in of_problem]
    for before, after in zip(drawn, scored, strict=True):
        assert after.reward == labels.path_reward(after.step_scores, "mean")
        assert len(after.step_ends) == len(after.step_scores)
        assert (
            replace(after, reward=before.reward, step_scores=(), step_ends=()) == before
        )  # the answer's reward, too, stays
    assert next(s for s in scored if s.token_ids == (5, 6)).reward == 0  # no whole step
    assert facts["solutions"] > 8 and 0 < facts["labelled_right"] < 1
    assert facts["trained_tokens"] == facts["reward_model"]["trained_tokens"] > 0
    again, same = labels.process(own)
    assert again == scored and same == facts
    with pytest.raises(ValueError, match="'process' or 'outcome'"):
        small.process.but(labels="both")


def test_process_draws_and_learns_with_a_seed_of_its_own(job, labelled, tmp_path):
    labels.process(replace(job, folder=tmp_path, seed=5 - labels.SEED))
    assert reward_model.Solution.read(tmp_path / "labels.jsonl", "01b_reward") == labelled
    learned = reward_model.train(job.config, labelled, tmp_path / "alone", 5)
    assert learned == json.loads((tmp_path / "reward_model" / "facts.json").read_text())


def test_truth_of_a_prefix_is_that_of_all_its_lines(config, task, tokenizer):
    events = (Event("half", 0, 2), Event("boxes", 0, 3, 4), Event("gets", 0, 5, who="Ben"))
    problem = make_problem("x", Story("Ann", "pens", 12, events, False))
    text = "12 / 2 = 6\n3 + 4 = 7\n6 + 7 = 13\n13 + 5 = 18\nFinal answer: 18"
    ids = tuple(encode_response(tokenizer, text, 2))
    wrong, right = (Sample("x", 0, t, None, 1.0, 1.0, True, -1.0, ids) for t in (text, problem.solution))
    with sampler.opened(config, None, task, [problem]) as policy:
        prompt = policy.prompts([problem])["x"]
    solution = labels.solution_of(tokenizer, prompt, wrong)
    assert truth.with_truth(task, [problem], tokenizer, [solution])[0].truth == (True, False, False, False, False)
    samples = [wrong, replace(wrong, reward=0.0, answer_reward=0.0), right]
    assert truth.right_for_wrong_reason(task, [problem], samples) == {
        "right": 2 / 3,
        "of_them_with_a_wrong_step": 0.5,
    }


def test_quality_by_hand():
    steps = [{"outcomes": o, "truth": t} for o, t in (("1100", True), ("0010", True), ("1000", False), ("0000", False))]
    table = {(row["k"], row["delta"]): row for row in truth.label_quality(steps, [1, 4])}
    assert set(table) == {(1, 0), (4, 0), (4, 1), (4, 2), (4, 3)}
    assert (table[1, 0]["precision"], table[1, 0]["recall"], table[1, 0]["accuracy"]) == (0.5, 0.5, 0.5)
    assert (table[4, 0]["precision"], table[4, 0]["recall"], table[4, 0]["labelled_right"]) == (2 / 3, 1, 0.75)
    assert (table[4, 1]["precision"], table[4, 1]["recall"]) == (1, 0.5)
    assert (table[4, 3]["precision"], table[4, 3]["recall"]) == (None, 0)


def test_calibration_by_hand():
    curve, facts = truth.calibration([0.05, 0.05, 0.95, 1.0], [False, True, True, True])
    assert [(b["count"], b["right"]) for b in curve] == [(2, 0.5), (2, 1)]
    assert facts["ece"] == pytest.approx((2 * 0.45 + 2 * 0.025) / 4)
    assert facts["auc"] == pytest.approx(2.5 / 3)
    assert truth.calibration([0.25, 0.25, 0.25, 0.25], [True, False, False, False])[1]["ece"] == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6), st.data())
def test_best_of_n_is_the_mean_over_all_choices(rows, data):
    n = data.draw(st.integers(1, len(rows)))
    found = metrics.best_of_n([r for r, _ in rows], [ok for _, ok in rows], n)
    wanted = []
    for chosen in combinations(rows, n):
        best = [ok for r, ok in chosen if r == max(r for r, _ in chosen)]
        wanted.append(sum(best) / len(best))
    assert found == pytest.approx(sum(wanted) / len(wanted))


def test_votes_by_hand():
    def vote(weights, n=3):
        return metrics.weighted_majority(["a", "b", "b"], weights, [True, False, False], n)

    assert [vote(w) for w in ([1, 1, 1], [3, 1, 1], [2, 1, 1])] == [0, 1, 0.5]
    assert vote([0, 0, 0]) == 0.5  # no weight at all: every answer that was given is as good
    assert vote([1, 1, 1], 1) == pytest.approx(1 / 3, abs=0.1)
    assert metrics.weighted_majority([None, None], [1, 1], [False, False], 2) == 0
    assert metrics.weighted_majority([None, "a"], [9, 1], [False, True], 2) == 1
    tied = [["1/2", "0.5", "3"], [1, 1, 1], [True, True, False]]  # two of the three that tie are right
    assert metrics.weighted_majority(*tied, 3) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="a vote of 4 needs at least 4 samples"):
        vote([1, 1, 1], 4)
    with pytest.raises(ValueError, match="best of 2 needs at least 2"):
        metrics.best_of_n([1.0], [True], 2)


def test_against_n_joins_them():
    record = {"answers": ["a", "b", "b", None], "rewards": [1.0, 0.0, 0.0, None], "path_rewards": [0.9, 0.2, 0.3, 0.1]}
    one, four = metrics.against_n([record], [1, 4])
    assert one["best_of_n"] == one["pass"] == 0.25
    assert (four["majority"], four["weighted"], four["best_of_n"], four["pass"]) == (0, 1, 1, 1)
