"""A completions server draws what the stages store: the protocol in a small server here, the real sampler behind it."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import drive

from irpo_utils import files
from irpo_utils.extras import server
from irpo_utils.extras.remote import problem_seed
from irpo_utils.files import ConfigError
from irpo_utils.methods import parts
from irpo_utils.model import load, sampling
from irpo_utils.model.prompts import encode_prompts
from irpo_utils.model.records import Sample
from irpo_utils.run import store
from irpo_utils.run.presets import load_preset
from irpo_utils.run.stages import EvaluateStage, SampleStage

GREEDY = dict(n=1, temperature=0, seed=0, eos_id=2, max_new_tokens=64)
DRAWN = dict(n=4, temperature=0.8, seed=3, eos_id=2, max_new_tokens=64)
SETTINGS = ["task.train_size=6", "task.dev_size=4", "task.test_size=4", "sampling.n=4", "evaluation.samples=4"]


class Stub:
    """The models that a server has, the requests that it was sent, and what it does wrong."""

    lock = threading.Lock()  # one model for all tests, and what one has left behind may still be at work

    def __init__(self, base):
        self.models, self.requests, self.loads = {"seed": base}, [], True
        self.change = lambda reply: reply

    def complete(self, body):
        with self.lock:
            self.requests.append(body)
            options = {name: body[name] for name in ("n", "temperature", "seed")}
            options |= {"eos_id": body["stop_token_ids"], "max_new_tokens": body["max_tokens"]}
            (drawn,) = sampling.sample(self.models[body["model"]], {"": body["prompt"]}, **options)
        return self.change(
            {"model": body["model"], "choices": [self.choice(i, c, body) for i, c in enumerate(drawn[""])]}
        )

    def choice(self, index, completion, body):
        shares = [completion.logp / len(completion.token_ids)] * len(completion.token_ids)
        choice = {"index": index, "text": "?", "logprobs": {"token_logprobs": shares}}
        if body.get("return_token_ids"):
            choice |= {"token_ids": completion.token_ids, "prompt_token_ids": body["prompt"]}
        return choice

    def answer(self, path, body):
        """(status, reply)"""
        if path == "/v1/models":
            return 200, {"data": [{"id": name} for name in self.models]}
        if path == "/v1/completions" and body["model"] in self.models:
            return 200, self.complete(body)
        if path == "/v1/load_lora_adapter" and self.loads:
            config = load_preset("micro").model
            self.models[body["lora_name"]] = load.load_policy(config, files.Path(body["lora_path"]), threads=1)
            return 200, "Success: it is there"
        return 404, {"error": {"message": f"no {path} of {body and body.get('model')}"}}


@contextmanager
def serving(stub):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self, body=None):
            status, reply = stub.answer(self.path, body)
            sent = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def do_POST(self):
            self.do_GET(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


@pytest.fixture
def stub(seed_model):
    return Stub(seed_model)


@pytest.fixture
def url(stub, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(stub) as found:
        yield found


@pytest.fixture
def asking(config, url):
    """The micro configuration that asks the server."""
    return config.but(sampling=config.sampling.but(engine="server", url=f"{url}/v1/"))


@pytest.fixture(scope="module")
def prompts(tokenizer, task):
    return encode_prompts(task, tokenizer, task.problems("train")[:6])


def collected(batches):
    return {name: completions for batch in batches for name, completions in batch.items()}


def ids(completions):
    return {name: [c.token_ids for c in cs] for name, cs in completions.items()}


def adapter_in(config, folder):
    """A policy that differs from the base."""
    policy = load.load_policy(config.model, trainable=True, seed=0)
    torch.manual_seed(1)
    for name, weights in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.2)
    load.save(policy, folder)
    return folder


def test_a_prompt_s_ids_go_there_and_the_drawn_ids_come_back(asking, stub, seed_model, prompts):
    engine = server.Server(asking, None)
    whole = collected(sampling.sample(seed_model, prompts, **GREEDY))
    drawn = collected(engine.sample(prompts, **GREEDY))
    assert ids(drawn) == ids(whole) and all(c.finished for (c,) in drawn.values())
    assert {k: round(c.logp, 3) for k, (c,) in drawn.items()} == {k: round(c.logp, 3) for k, (c,) in whole.items()}
    sent = stub.requests[0]
    assert sent["prompt"] in prompts.values() and sent["stop_token_ids"] == [2] and sent["ignore_eos"]
    assert sent["model"] == "seed" and sent["top_p"] == 1 and sent["top_k"] == -1 and sent["return_token_ids"]


def test_a_problem_s_samples_depend_on_its_seed_alone(asking, stub, prompts):
    engine, (alone, *_) = server.Server(asking, None), prompts
    together = ids(collected(engine.sample(prompts, **DRAWN)))
    assert {r["seed"] for r in stub.requests} == {problem_seed(3, name) for name in prompts}
    assert ids(collected(engine.sample({alone: prompts[alone]}, **DRAWN))) == {alone: together[alone]}
    assert ids(collected(engine.sample(prompts, **DRAWN | {"seed": 4}))) != together
    assert all(len(own) == 4 for own in together.values())


def test_greedy_responses_and_beginnings_as_with_every_engine(asking, seed_model, prompts):
    engine = server.Server(asking, None)
    greedy, drawn = (ids(collected(engine.sample(prompts, **options))) for options in (GREEDY, DRAWN))
    both = ids(collected(engine.sample(prompts, **DRAWN, greedy_too=True)))
    assert both == {name: greedy[name] + drawn[name] for name in prompts}
    starts = {name: [own[0][:length] for length in (0, 3)] for name, own in greedy.items()}
    found = ids(collected(engine.sample(prompts, **GREEDY, starts=starts)))
    assert found == {name: own * 2 for name, own in greedy.items()}


def test_an_adapter_is_loaded_there_under_a_name_of_its_own(asking, stub, seed_model, prompts, tmp_path):
    policy = adapter_in(asking, tmp_path)
    wanted = ids(collected(sampling.sample(load.load_policy(asking.model, policy, threads=1), prompts, **GREEDY)))
    assert wanted != ids(collected(sampling.sample(seed_model, prompts, **GREEDY)))
    for _ in range(2):  # the second time it is there
        assert ids(collected(server.Server(asking, policy).sample(prompts, **GREEDY))) == wanted
        assert list(stub.models) == ["seed", server.served_name(policy)]
    (policy / "adapter_config.json").write_text((policy / "adapter_config.json").read_text() + " ")
    assert server.served_name(policy) not in stub.models  # trained anew, it is another one


def test_the_stages_sample_and_evaluate_with_it(url, stub, tmp_path):
    settings = [*SETTINGS, "sampling.engine=server", f"sampling.url={url}"]
    files.write_text(tmp_path / "config.yaml", store.dump(load_preset("micro", settings)))
    stage = SampleStage(tmp_path, iteration=1).begin()
    samples = stage.run()
    assert len(samples) == 24 and all((s.token_ids[-1] == 2) == s.finished for s in samples)
    assert {s.reward for s in samples} <= {1.0, 0.0, None} and any(s.reward is not None for s in samples)
    assert Sample.read(stage.path("samples.jsonl"), "") == samples and len(stub.requests) == 6
    stage.finish()
    key = stage.key()["parameters"]
    assert key["sampling.engine"] == "server" and "sampling.url" not in key and stage.is_done()
    summary, responses = EvaluateStage(tmp_path, iteration=0).begin().run()
    drawn = {"dev": 0, "test": 4}  # besides the greedy response
    assert len(responses) == 8 and all(len(r["answers"]) == drawn[r["split"]] and "greedy" in r for r in responses)
    assert set(summary) == {"dev", "test"}


def without(name):
    def change(reply):
        for choice in reply["choices"]:
            del choice[name]
        return reply

    return change


def cut(reply):
    for choice in reply["choices"]:
        choice["token_ids"] = choice["token_ids"][:-1]
    return reply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("token_ids"), "returns no token ids with their log-probabilities"),
        (without("logprobs"), "returns no token ids with their log-probabilities"),
        (lambda reply: reply | {"choices": reply["choices"][:1]}, "draws 1 responses where 4 are asked for"),
        (lambda reply: reply | {"model": "other"}, "was asked for seed and answers as other"),
        (
            lambda reply: {**reply, "choices": [{**c, "prompt_token_ids": [1]} for c in reply["choices"]]},
            "changes prompts",
        ),
        (cut, "cuts responses"),
        (lambda reply: "<html>", "returns no token ids"),
    ],
)
def test_answers_in_another_form_are_refused(asking, stub, prompts, change, message):
    stub.change = change
    with pytest.raises(server.ServerError, match=message):
        list(server.Server(asking, None).sample(prompts, **DRAWN))


@pytest.mark.parametrize("url", ["localhost:8000", "http://[::1"])
def test_an_address_that_is_none_is_named(config, url):
    asked = config.but(sampling=config.sampling.but(engine="server", url=url))
    with pytest.raises(ConfigError, match=r"sampling\.url: no server answers at "):
        server.check(asked)


def test_no_server_is_refused_before_the_run(config):
    nobody = config.but(sampling=config.sampling.but(engine="server", url="http://127.0.0.1:9"))
    with pytest.raises(
        ConfigError, match=r"sampling\.url: no server answers at http://127\.0\.0\.1:9 \(.*\); is it running"
    ):
        server.check(nobody)
    done = drive("micro", "run=test-server", "sampling.engine=server", "sampling.url=http://127.0.0.1:9")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert not (files.OUTPUTS / "test-server").exists()


def test_another_model_is_refused(asking, stub, tmp_path):
    stub.models = {"other": None}
    with pytest.raises(
        ConfigError, match="serves other and not seed; serve it by that name .*--served-model-name seed"
    ):
        server.check(asking)
    stub.models, stub.loads = {"seed": None}, False
    server.check(asking)
    with pytest.raises(server.ServerError, match="answers 404(.|\n)*load .* by the name irpo-.*--enable-lora"):
        server.Server(asking, adapter_in(asking, tmp_path))


def test_a_failure_of_the_server_s_own_is_told_with_its_words(asking, stub, prompts):
    engine = server.Server(asking, None)
    stub.models = {}
    with pytest.raises(server.ServerError, match="/v1/completions answers 404: .*no /v1/completions of seed"):
        list(engine.sample(prompts, **DRAWN))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampling.engine=server"], r"sampling\.url: where the server is"),
        (["sampling.url=http://x"], r"sampling\.url: .* for sampling\.engine=server alone"),
        (
            ["sampling.engine=server", "sampling.url=http://x", "sampling.workers=2"],
            "a server draws everything at once",
        ),
        (["sampling.engine=server", "sampling.url=http://x", "model.quantize=nf4"], "a server would not run the 4-bit"),
        (["sampling.engine=server", "sampling.url=http://x", "model.tuning=full"], "takes an adapter while it runs"),
    ],
)
def test_what_a_server_cannot_do_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_preset("micro", overrides)


def test_the_table_names_it():
    row = parts.SAMPLERS["server"]
    assert row.load() is server.opened and files.load_object(row.check) is server.check
