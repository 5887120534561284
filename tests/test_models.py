"""The shipped seed model is the recorded one; adapters, NF4 and the two checks before training."""

import copy
import json
import math
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, TrainerCallback
from transformers.integrations import integration_utils

from irpo_utils.files import ConfigError, MissingArtefact, read_jsonl, relative
from irpo_utils.methods.parts import LOSSES
from irpo_utils.methods.select import cyclic_pairs
from irpo_utils.model import adapter, load, logprobs, losses, sampling, schedule, training
from irpo_utils.model.prompts import encode_prompts, stop_ids
from irpo_utils.model.records import Pair
from irpo_utils.run import driver
from irpo_utils.run.config import dump
from irpo_utils.run.presets import load_preset
from irpo_utils.run.stages import TrainStage
from irpo_utils.settings import ModelConfig, TrainConfig
from irpo_utils.tasks import get_task
from irpo_utils.tasks.grading import grade


def drawn_pairs(config, model, tokenizer, task, n) -> list[Pair]:
    """Up to four cyclic pairs of a right and a wrong response for each of 24 problems, from `n` samples of each."""
    problems, pairs = {p.id: p for p in task.problems("train")[:24]}, []
    prompts = encode_prompts(task, tokenizer, list(problems.values()))
    settings = dict(temperature=1.0, seed=0, eos_id=stop_ids(config.model, tokenizer), max_new_tokens=64)
    for batch in sampling.sample(model, prompts, n=n, **settings):
        for name, completions in batch.items():
            distinct = list({tuple(c.token_ids): c for c in completions if c.finished}.values())
            texts = [tokenizer.decode(c.token_ids[:-1]) for c in distinct]
            verdicts = grade(task, texts, [problems[name]] * len(texts))
            samples = list(zip(texts, distinct, verdicts, strict=True))
            winners = [(text, c) for text, c, verdict in samples if verdict.correct]
            losers = [(text, c) for text, c, verdict in samples if not verdict.correct]
            for (chosen, w), (rejected, loser) in cyclic_pairs(winners, losers, 4):
                ids = (tuple(found) for found in (prompts[name], w.token_ids, loser.token_ids))
                pairs.append(Pair(name, task.prompt(problems[name]), chosen, rejected, *ids, w.logp, loser.logp))
    return pairs


@pytest.fixture(scope="module")
def pairs(seed_model, tokenizer, task, config):
    return drawn_pairs(config, seed_model, tokenizer, task, n=16)


def run(model, pairs, folder, config, loss="dpo+nll", **kwargs):
    """Train with a loss of the table, which also says what it takes."""
    row = LOSSES[loss]
    settings = dict(
        loss=row.load(),
        weights={name: getattr(config.train, name) for name in row.parameters},
        has_reference=row.reference,
        config=config.train,
        seed=0,
        sampled_by_start=True,
        show=lambda text: None,
    )
    return training.train(model, pairs, folder, **(settings | kwargs))


def fresh(config, threads=0):
    """M_0 with a fresh adapter, ready for training."""
    return load.load_policy(config.model, trainable=True, seed=0, threads=threads)


def test_training_starts_at_ln2_learns_and_is_repeatable(config, pairs, tmp_path):
    finals = []
    for name in ("first", "second"):
        model = fresh(config, threads=1)
        facts = run(model, pairs, tmp_path / name, config)
        assert facts["dpo_at_start"] == pytest.approx(training.LN2, abs=1e-5)
        finals.append((tmp_path / name / "best" / "adapter_model.safetensors").read_bytes())
    assert finals[0] == finals[1]
    steps = read_jsonl(tmp_path / "first" / "steps.jsonl")
    assert steps[-1]["margin"] > steps[0]["margin"]


def reported(config, names):
    """The configuration with training shown at `names`."""
    return config.but(train=config.train.but(report_to=names, eval_every=3, max_steps=6))


def test_steps_are_reported_through_the_callbacks_and_change_nothing(config, pairs, tmp_path, monkeypatch):
    """transformers' callback of a name gets every step's record; the weights and the records are the same bytes."""
    told = []

    class Listener(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            told.append((args.run_name, state.global_step, dict(logs)))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Listener)
    found = []
    for names in ((), ("wandb",)):
        folder = tmp_path / f"m{len(names)}" / ".03_train.partial"
        run(fresh(config, threads=1), pairs, folder, reported(config, names), score=lambda policy: 0.5)
        found.append([(folder / name).read_bytes() for name in ("best/adapter_model.safetensors", "steps.jsonl")])
        assert told if names else not told
    assert found[0] == found[1]
    steps = [logs for _, _, logs in told if "dpo" in logs]
    assert [{"step": i, **logs} for i, logs in enumerate(steps, 1)] == [
        row | {"epoch": logs["epoch"]}
        for row, logs in zip(map(json.loads, found[0][1].splitlines()), steps, strict=True)
    ]
    assert {"loss", "dpo", "nll", "margin", "chosen_logp", "rejected_logp", "dev_greedy"} <= set(steps[2])
    assert {name for name, _, _ in told} == {relative(tmp_path / "m1")}


def test_tensorboard_gets_the_steps(config, pairs, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")  # so that it is put back
    folder = tmp_path / ".03_train.partial"
    run(fresh(config, threads=1), pairs, folder, reported(config, ("tensorboard",)), score=lambda policy: 0.5)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    written = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert written == [(s["step"], pytest.approx(s["loss"])) for s in read_jsonl(folder / "steps.jsonl")]
    assert [event.step for event in events.Scalars("train/dev_greedy")] == [3, 6]


def test_who_is_told_is_in_no_key_and_a_missing_package_is_named(config, tmp_path, monkeypatch):
    told, untold = (TrainStage(tmp_path, config=reported(load_preset("micro"), n)) for n in (("wandb",), ()))
    assert told.parameters() == untold.parameters()
    monkeypatch.setattr(driver, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="train.report_to: wandb is not installed; pip install wandb"):
        driver.check_inputs(load_preset("micro", ["irpo.train.report_to=wandb"]))


def test_a_run_killed_while_training_ends_the_same(config, pairs, tmp_path):
    """Stop hard after step 4 of 6 (a checkpoint lies at 3), as a kill would, and go on."""

    class Killed(BaseException):
        pass

    def kill(policy):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return 0.5

    train = config.train.but(eval_every=3, max_steps=6)
    config = config.but(train=train)
    model = fresh(config, threads=1)
    run(model, pairs, tmp_path / "whole", config, score=lambda policy: 0.5)
    calls: list[int] = []
    with pytest.raises(Killed):
        run(fresh(config), pairs, tmp_path / "cut", config, score=kill)
    (tmp_path / "cut" / "checkpoints" / "checkpoint-6").mkdir()  # half-written: has no mark
    run(fresh(config), pairs, tmp_path / "cut", config, score=lambda policy: 0.5)
    for name in ("steps.jsonl", "best/adapter_model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_training_that_was_stopped_at_its_step_is_not_trained_on(config, pairs, tmp_path):
    """Called again on the same folder, as by a run that was killed just before its stage was done."""
    facts, config = [], config.but(train=config.train.but(max_steps=6))
    for _ in range(2):
        facts.append(run(fresh(config, threads=1), pairs, tmp_path, config, stop_after=4))
    assert facts[0] == facts[1] and facts[0]["best_step"] == 4
    assert len(read_jsonl(tmp_path / "steps.jsonl")) == 4


def test_the_watched_pairs_are_the_same_from_before_the_first_step_to_after_the_last(config, pairs, tmp_path):
    start, config = fresh(config, threads=1), config.but(train=config.train.but(max_steps=4, eval_every=2))
    many = pairs * (1 + 2 * training.WATCHED // len(pairs))
    watched = many[:: -(-len(many) // training.WATCHED)]
    before = training.mean_logps(logprobs.reference_logps(start, watched))
    facts = run(start, many, tmp_path, config)
    assert {name: facts[name] for name in before} == pytest.approx(before, rel=1e-4)
    steps = read_jsonl(tmp_path / "steps.jsonl")
    assert ["watched_chosen_logp" in s for s in steps] == [False, True, False, True]
    after = training.mean_logps(logprobs.reference_logps(start, watched))  # it was trained in place
    assert {name: steps[-1][name] for name in after} == pytest.approx(after, rel=1e-4)
    assert after != pytest.approx(before, rel=1e-4)


def test_accumulated_micro_batches_are_the_whole_batch(config, pairs, tmp_path):
    losses = []
    for micro in (8, 2):
        cut = config.but(train=config.train.but(micro_batch=micro, max_steps=3))
        run(fresh(config), pairs, tmp_path / str(micro), cut)
        losses.append([s["loss"] for s in read_jsonl(tmp_path / str(micro) / "steps.jsonl")])
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


def test_wrong_reference_is_refused():
    zero = torch.zeros(2)
    terms = losses.dpo_nll(losses.Scores(zero, zero - 1, zero, zero - 3, torch.ones(2)), beta=0.1, alpha=1.0)
    with pytest.raises(RuntimeError, match="not ln 2.*check that both are M_t"):
        training.check_start(terms.dpo, 1e-3)


def test_a_loss_without_a_reference_scores_none_unless_it_verifies_who_sampled(config, pairs, tmp_path, monkeypatch):
    scored: list[int] = []
    whole = training.kept_reference_logps
    monkeypatch.setattr(training, "kept_reference_logps", lambda *a: scored.append(1) or whole(*a))
    config = config.but(train=config.train.but(max_steps=8, max_epochs=8))
    one_batch = pairs[: config.train.batch]  # every step is of the same pairs
    facts = run(fresh(config, threads=1), one_batch, tmp_path / "orpo", config, loss="orpo", sampled_by_start=False)
    assert not scored and facts["dpo_at_start"] is None and facts["sampler_gap"] is None
    steps = read_jsonl(tmp_path / "orpo" / "steps.jsonl")
    assert "dpo" not in steps[0] and steps[-1]["odds"] < steps[0]["odds"] and steps[-1]["margin"] > steps[0]["margin"]
    assert steps[0]["loss"] == pytest.approx(steps[0]["nll"] + 0.1 * steps[0]["odds"], abs=1e-6)
    facts = run(fresh(config), pairs, tmp_path / "checked", config, loss="orpo")
    assert scored and facts["sampler_gap"] < 1e-3
    gold = [replace(p, chosen_logp=None, rejected_ids=(), rejected_logp=None) for p in pairs]
    scored.clear()
    assert run(fresh(config), gold, tmp_path / "nll", config, loss="nll")["best_step"] and not scored


def test_pairs_of_another_model_are_refused(config, pairs, tmp_path):
    model = fresh(config)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).add_(0.5)
    with pytest.raises(RuntimeError, match="not samples of M_t; run 01_sample"):
        run(model, pairs, tmp_path, config)


def test_a_reference_of_another_model_comes_with_the_pairs_and_is_used_as_it_is(config, pairs, tmp_path):
    """A reference that likes the chosen response 1 nat less, the rejected one 1 nat more: z = 2 beta at the start."""
    config = config.but(train=config.train.but(max_steps=3))
    start = logprobs.reference_logps(fresh(config, threads=1), pairs)
    referred = [
        replace(pair, reference_chosen=chosen - 1, reference_rejected=rejected + 1)
        for pair, (chosen, rejected) in zip(pairs, start, strict=True)
    ]
    facts = run(fresh(config), referred, tmp_path / "given", config, reference_is_start=False)
    assert facts["dpo_at_start"] is None and facts["sampler_gap"] < 1e-3  # who sampled is verified all the same
    first = read_jsonl(tmp_path / "given" / "steps.jsonl")[0]
    assert first["margin"] == pytest.approx(2 * config.train.beta, abs=1e-4)
    assert first["dpo"] == pytest.approx(math.log1p(math.exp(-2 * config.train.beta)), abs=1e-4)
    drawn_elsewhere = [replace(p, chosen_logp=p.chosen_logp - 1) for p in referred]
    with pytest.raises(RuntimeError, match="not samples of M_t; run 01_sample"):
        run(fresh(config), drawn_elsewhere, tmp_path / "elsewhere", config, reference_is_start=False)
    with pytest.raises(ValueError, match="no log-probabilities of the reference"):
        run(fresh(config), pairs, tmp_path / "none", config, reference_is_start=False)


def test_a_loss_of_one_s_own_trains_with_its_own_weights(config, pairs, tmp_path):
    """IPO (arXiv 2310.12036, Eq. 17): it has a reference, and no term that would be ln 2."""

    def ipo(scores, tau):
        margin = scores.chosen - scores.reference_chosen - (scores.rejected - scores.reference_rejected)
        chosen_nll = losses.nll_term(scores.chosen, scores.chosen_lengths)
        return losses.PairLosses((margin - 1 / (2 * tau)) ** 2, None, chosen_nll, margin, torch.zeros_like(margin))

    config = config.but(train=config.train.but(max_steps=8))
    run_settings = dict(config=config.train, seed=0, sampled_by_start=True, show=lambda text: None)
    model = fresh(config, threads=1)
    facts = training.train(model, pairs, tmp_path, loss=ipo, weights={"tau": 0.5}, has_reference=True, **run_settings)
    steps = read_jsonl(tmp_path / "steps.jsonl")
    assert facts["dpo_at_start"] is None and steps[0]["loss"] == pytest.approx(1.0, abs=1e-3)
    assert steps[-1]["margin"] > steps[0]["margin"]


def test_adapter_goes_on_where_it_was(config, pairs, tmp_path, tokenizer):
    model = fresh(config)
    run(model, pairs, tmp_path, config)
    model.eval()
    rows = logprobs.collate([(p.prompt_ids, p.chosen_ids) for p in pairs[:6]])
    with torch.no_grad():
        wanted = logprobs.response_logps(model, rows)
        for trainable in (False, True):
            again = load.load_policy(config.model, tmp_path / "best", trainable=trainable).eval()
            assert torch.allclose(logprobs.response_logps(again, rows), wanted, atol=1e-4)
    assert any(p.requires_grad for p in again.parameters())


def test_full_tuning_saves_a_whole_model(config, pairs, tmp_path):
    full = config.but(model=config.model.but(tuning="full"), train=config.train.but(lr=1e-4, max_steps=3))
    model = load.load_policy(full.model, trainable=True)
    run(model, pairs, tmp_path, full)
    again = load.load_policy(full.model, tmp_path / "best")
    assert not load.is_adapter(tmp_path / "best")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_nf4_with_lora_samples_and_trains_on_a_cpu(config, tokenizer, task, tmp_path):
    """The base really is in 4 bits, sampling runs the very function that is trained, and the pairs are its samples."""
    import bitsandbytes as bnb

    nf4 = config.but(model=config.model.but(quantize="nf4"), train=config.train.but(max_steps=4))
    model = load.load_policy(nf4.model, threads=1)
    base = load.load_base(nf4.model)
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in base.modules()) == 28  # 7 in each of 4 layers
    pairs = drawn_pairs(nf4, model, tokenizer, task, n=8)
    policy = load.load_policy(nf4.model, trainable=True)
    facts = run(policy, pairs, tmp_path, nf4)
    assert facts["dpo_at_start"] == pytest.approx(training.LN2, abs=1e-3)
    steps = read_jsonl(tmp_path / "steps.jsonl")
    assert steps[-1]["margin"] > steps[0]["margin"] == pytest.approx(0, abs=1e-3)
    rows = logprobs.collate([(p.prompt_ids, p.chosen_ids) for p in pairs[:8]])
    with torch.no_grad():
        wanted = logprobs.response_logps(policy.eval(), rows)
        again = logprobs.response_logps(load.load_policy(nf4.model, tmp_path / "best"), rows)
    assert torch.allclose(again, wanted, atol=1e-4)


def test_nf4_gradients_are_those_of_the_dequantized_model_also_after_a_forward_in_eval_mode(config):
    """bitsandbytes would switch to a kernel without a gradient there (see load.load_base)."""
    import bitsandbytes as bnb

    nf4 = load.load_policy(config.model.but(quantize="nf4"), trainable=True, seed=0)
    dense = fresh(config)
    twins, parameters = dict(dense.named_modules()), dict(dense.named_parameters())
    for name, module in nf4.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            twins[name].weight.data = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    trained = {n: p for n, p in nf4.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in trained.items():
            parameters[name].copy_(p.normal_(std=0.02))
    batch = logprobs.collate([([1, 5, 6, 7], [9, 8, 2]), ([1, 5, 6, 7, 10, 11], [9, 8, 12, 13, 2])])
    with torch.no_grad():
        logprobs.response_logps(nf4.eval(), batch)
    for model in (nf4.train(), dense.train()):
        logprobs.response_logps(model, batch).sum().backward()
    for name, p in trained.items():
        assert torch.allclose(p.grad, parameters[name].grad, rtol=1e-4, atol=1e-5), name


def test_a_folder_without_a_policy_is_named(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no policy.*run 03_train first"):
        load.load_policy(config.model, tmp_path)


def test_a_damaged_adapter_is_named(config, tmp_path):
    load.save(load.load_policy(config.model, trainable=True), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(
        FileNotFoundError, match=f"{tmp_path.name} is damaged .*the notebook that made it makes it again"
    ):
        load.load_policy(config.model, tmp_path)


def test_an_adapter_that_lacks_weights_or_holds_one_that_is_not_finite_is_damaged(config, tmp_path):
    load.save(load.load_policy(config.model, trainable=True), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    whole = load_file(weights)
    name = sorted(whole)[0]
    save_file({f"another.{name}": weight for name, weight in whole.items()}, weights, {"format": "pt"})
    with pytest.raises(MissingArtefact, match=f"is damaged .{len(whole)} of its weights are not in its file, as "):
        load.load_policy(config.model, tmp_path)
    save_file(whole | {name: whole[name] * float("nan")}, weights, {"format": "pt"})
    with pytest.raises(MissingArtefact, match=f"is damaged .{name} is not finite"):
        load.load_policy(config.model, tmp_path)


def test_a_run_that_is_killed_before_its_checkpoint_goes_back_to_the_best_step_before(tmp_path):
    for name, step in (("best", 4), ("best.before", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "best.json").write_text(json.dumps({"step": step, "score": step / 10}))
    training.rewind(tmp_path, 2)
    assert json.loads((tmp_path / "best" / "best.json").read_text())["step"] == 2
    training.rewind(tmp_path, 0)
    assert not list(tmp_path.glob("best*"))


def test_order_is_whole_shuffled_passes_cut_to_the_budget():
    problems, config = ["p"] * 10, TrainConfig(batch=4, micro_batch=4, max_steps=5, max_epochs=9)
    order = schedule.training_order(problems, config, seed=0)
    assert len(order) == 20 and sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert len(schedule.training_order(problems, config.but(max_steps=99, max_epochs=1), seed=0)) == 8


def test_retraining_with_dev_takes_the_selected_steps_and_survives_a_kill(config, pairs, tmp_path, monkeypatch):
    """The second training stops at the step that dev chose, on the schedule of the first. Killed in it, it goes on."""
    task = get_task(config.task)
    epochs = {"max_steps": 1000, "max_epochs": 1}  # so that the dev problems' pairs would make it longer
    train = config.train.but(retrain_with_dev=True, eval_every=2, batch=4, micro_batch=4, **epochs)
    pairs, steps = pairs[:24], 6
    config = config.but(train=train)
    scores = {2: 0.1, 4: 0.9, 6: 0.2}
    dev_pairs = [replace(p, problem=d.id) for p, d in zip(pairs, task.problems("dev"), strict=False)]
    whole = training.train
    taken: list[tuple[int, int | None, int]] = []

    def watched(model, rows, folder, **settings):
        calls = iter(sorted(scores))
        if settings.get("score"):
            settings["score"] = lambda policy: scores[next(calls)]
        elif len(taken) == 1 and kill:
            settings["score"] = lambda policy: (_ for _ in ()).throw(KeyboardInterrupt)
        taken.append((len(rows), settings.get("stop_after"), settings["config"].max_steps))
        return whole(model, rows, folder, **settings)

    monkeypatch.setattr(training, "train", watched)
    adapters = []
    for name, kill in (("undisturbed", False), ("killed", True)):
        run_folder = tmp_path / name
        run_folder.mkdir()
        (run_folder / "config.yaml").write_text(dump(config))
        stage = TrainStage(run_folder)
        Pair.write(stage.path("pairs.jsonl"), pairs + dev_pairs)
        taken.clear()
        if kill:
            with pytest.raises(KeyboardInterrupt):
                stage.begin().run(show=lambda line: None)
            kill = False
            scores = {6: 0.2}  # the first training is over; nothing of it is scored again
        facts = stage.begin().run(show=lambda line: None)
        assert facts["best_step"] == 4 and facts["retrained_with_dev"]
        assert facts["steps"] == steps
        assert taken[-2:] == [(len(pairs), None, 1000), (len(pairs) + len(dev_pairs), 4, steps)]
        adapters.append((stage.path("adapter") / "adapter_model.safetensors").read_bytes())
        stage.finish()
    assert adapters[0] == adapters[1]


@pytest.fixture
def sixteen_bits(tmp_path):
    """A base in bfloat16 and a folder with an adapter of it whose B is not zero."""
    config = ModelConfig(path="seed", dtype="bfloat16", lora_r=8, lora_alpha=16)
    model = load.load_policy(config, trainable=True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.03)
    load.save(model, tmp_path / "adapter")
    return config, tmp_path / "adapter"


def test_sixteen_bits_sample_the_policy_that_is_trained(sixteen_bits):
    config, folder = sixteen_bits
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        exact, trained, sampled, base = (
            load.load_policy(config.but(dtype=dtype), policy, trainable=trainable)(ids).logits.float().log_softmax(-1)
            for dtype, policy, trainable in (
                ("float32", folder, False),
                ("bfloat16", folder, True),
                ("bfloat16", folder, False),
                ("bfloat16", None, False),
            )
        )
    off, as_trained, adapter = ((other - exact).abs().mean() for other in (sampled, trained, base))
    assert off < 1.2 * as_trained < 0.1 * adapter


def of_adapter(model, ids, weights):
    """The loss and the adapter's gradients of a forward pass."""
    model.zero_grad()
    loss = (model(ids).logits.double() * weights).sum()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten().double() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_a_layer_that_trains_has_peft_s_values_and_gradients(sixteen_bits, dtype, near):
    config, folder = sixteen_bits
    model = load.load_policy(config.but(dtype=dtype), folder, trainable=True)
    ids = torch.arange(3, 67).view(2, 32)
    torch.manual_seed(0)
    weights = torch.randn(*ids.shape, model.config.vocab_size).double()
    ours = of_adapter(model, ids, weights)
    with model.disable_adapter(), torch.no_grad():
        without = model(ids).logits
    layers = [layer for layer in model.modules() if type(layer) is adapter.trained_layer()]
    assert len(layers) == 7 * model.config.num_hidden_layers and all(map(adapter.is_plain, layers))
    adapter.as_in_peft(model)
    theirs = of_adapter(model, ids, weights)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < near * b.norm()
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(without, model(ids).logits)


def small_with_adapter(**options):
    """A Qwen2, whose projections have biases, with an adapter that is no identity."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=40, num_key_value_heads=1, **shape))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", **options))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data)
    return model


@pytest.mark.parametrize(
    "options", [{"bias": "all"}, {"lora_bias": True}, {"use_dora": True}, {"use_rslora": True}, {"lora_dropout": 0.5}]
)
def test_a_layer_that_trains_is_peft_s_for_every_kind_of_adapter(options):
    model, ids = small_with_adapter(**options), torch.arange(3, 19).view(2, 8)
    weights = torch.randn(2, 8, 40).double()
    torch.manual_seed(1)
    theirs = of_adapter(model, ids, weights)
    assert adapter.train_beside(model) is model
    torch.manual_seed(1)
    for a, b in zip(of_adapter(model, ids, weights), theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_layer_that_trains_has_the_adapter_that_is_asked_for():
    model, ids = small_with_adapter(), torch.arange(3, 19).view(2, 8)
    model.add_adapter("ref", peft.LoraConfig(r=2, target_modules="all-linear"))  # B is zero: the base
    adapter.train_beside(model)
    with torch.no_grad():
        own = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
        model.set_adapter("ref")
        assert torch.allclose(model(ids).logits, base, atol=1e-6)
        model.set_adapter("default")
        assert torch.equal(model(ids).logits, own) and not torch.allclose(own, base, atol=1e-2)
        other = copy.deepcopy(model)
        next(weight for name, weight in other.named_parameters() if "lora_B" in name).zero_()
        assert not torch.equal(other(ids).logits, own) and torch.equal(model(ids).logits, own)


def test_an_adapter_s_dropout_does_not_make_another_policy_of_it(sixteen_bits):
    config, folder = sixteen_bits
    facts = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(facts | {"lora_dropout": 0.5}))
    model, ids = load.load_policy(config.but(dtype="float32"), folder, trainable=True).train(), torch.arange(3, 40)
    with torch.no_grad():
        assert torch.equal(model(ids[None]).logits, model(ids[None]).logits)
        assert torch.allclose(
            model(ids[None]).logits, load.load_policy(config.but(dtype="float32"), folder)(ids[None]).logits, atol=1e-3
        )


def test_an_adapter_beside_its_layer_is_as_exact_as_peft_s_and_a_folded_one_is_not(sixteen_bits):
    """What 16 bits lose of an adapter on average over many inputs: rounding that goes either way cancels there."""
    config, folder = sixteen_bits
    layer = load.load_policy(config, folder).model.layers[0].mlp.down_proj
    assert isinstance(layer, adapter.Beside) and layer.weight is layer.base.weight and layer.bias is None
    layer.b.mul_(1e-2 / layer.b.float().std())
    torch.manual_seed(0)
    x = (1 + torch.randn(4096, layer.a.shape[1])).bfloat16()
    w, a, b = layer.weight.float(), layer.a.float(), layer.b.float()
    exact = x.float() @ (w + b @ a).T
    with_peft = (layer.base(x).float() + x.float() @ a.T @ b.T).bfloat16()
    folded = x @ (w + b @ a).bfloat16().T
    beside, peft, fold = ((y.float() - exact).mean(0).norm() for y in (layer(x), with_peft, folded))
    assert beside < 2 * peft and beside < 0.3 * fold
