"""What leaves a run has a card of what was measured and no more, and goes to the hub as one commit."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from conftest import OUTPUTS, ROOT, drive, remove_run
from datasets import load_dataset
from transformers import AutoModelForCausalLM

from irpo_utils.report.cards import model_card, pairs_card
from irpo_utils.run.presets import load_preset
from irpo_utils.run.store import Stage


def parts_of(path):
    """A card's front matter and its text."""
    _, front, text = path.read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_model_s_card_says_what_it_is_and_what_was_measured(micro_run, tmp_path):
    run, _ = micro_run
    done = drive("export", run.name, str(tmp_path / "model"), "iteration=1")
    assert done.returncode == 0 and AutoModelForCausalLM.from_pretrained(tmp_path / "model"), done.stderr
    front, text = parts_of(tmp_path / "model" / "README.md")
    assert front["license"] == "apache-2.0" and front["library_name"] == "transformers" and "base_model" not in front
    for t, folder in ((0, "m0/seed_0"), (1, "irpo/seed_0/iteration_1")):
        for split, r in json.loads((run / folder / "evaluation.json").read_text()).items():
            low, high = (f"{100 * r[f'greedy_{end}']:.1f}" for end in ("low", "high"))
            assert f"| M_{t} | {split} | 16 | {100 * r['greedy']:.1f} % ({low} to {high}) |" in text
    assert "method: IRPO (DPO + NLL) (arXiv 2404.19733 v3), as reward answer, selection pairs" in text
    assert (run / "config.yaml").read_text() in text and f"./run_all.sh {run.name}" in text


def test_a_number_that_is_not_of_this_model_is_not_in_its_card(micro_run, tmp_path):
    """Neither a changed evaluation counts, nor one of a policy that was trained again, nor one that is not there."""
    folder = OUTPUTS / "test-cards"
    shutil.copytree(micro_run[0], folder)
    try:
        stage, round_1 = Stage(folder, "irpo", 0, 1), folder / "irpo" / "seed_0" / "iteration_1"
        evaluation, adapter = round_1 / "evaluation.json", round_1 / "adapter" / "adapter_config.json"
        for path in (evaluation, adapter):
            before = path.read_text()
            path.write_text(before + " ")
            model_card(stage, tmp_path / "README.md")
            assert "* accuracy: not measured" in parts_of(tmp_path / "README.md")[1]
            assert "| M_" not in (tmp_path / "README.md").read_text()
            path.write_text(before)
        (round_1 / "audit.json").unlink()
        pairs_card(stage, tmp_path / "pairs.md", "text")
        assert "samples" not in parts_of(tmp_path / "pairs.md")[1].partition("Made by")[0]
        evaluation.unlink()
        model_card(stage, tmp_path / "README.md")
        assert "* accuracy: not measured" in (tmp_path / "README.md").read_text()
    finally:
        remove_run("test-cards")


@pytest.mark.parametrize(
    ("path", "hub_name"),
    [("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"), ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")],
)
def test_the_licence_of_others_is_not_made_up(path, hub_name, tmp_path):
    (tmp_path / "config.yaml").write_text("")
    config = load_preset("micro", [f"model.path={path}"])
    model_card(Stage(tmp_path, "irpo", 0, 0, config), tmp_path / "README.md")
    front, text = parts_of(tmp_path / "README.md")
    assert front["base_model"] == hub_name and "license" not in front
    assert f"licence: not recorded; those of {path} and of stories hold" in text


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub calls of the hub to make a repository and to commit files to it."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        store, url = self.server.store, f"http://127.0.0.1:{self.server.server_port}"
        if self.headers.get("authorization") != "Bearer hf_stub":
            return self.answer({"error": "no such user"}, 401)
        if self.path == "/api/repos/create":
            store["repo"] = json.loads(body)
            return self.answer({"url": f"{url}/me/mine"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            return self.answer(
                {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
            )
        if self.path.endswith("/info/lfs/objects/batch"):
            (one,) = json.loads(body)["objects"]
            actions = {"upload": {"href": f"{url}/put/{one['oid']}"}}
            return self.answer({"transfer": "basic", "objects": [{**one, "actions": actions}]})
        assert "/commit/" in self.path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                store["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                store["files"][line["value"]["path"]] = store["put"][line["value"]["oid"]]
        store["commit"] = self.path
        return self.answer({"commitUrl": f"{url}/me/mine/commit/abc", "commitOid": "abc", "success": True})

    def do_PUT(self):
        self.server.store["put"][self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    """A hub on this machine and a function that runs a command with it; the endpoint is read when the library loads."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.store = {"files": {}, "put": {}}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    def command(*arguments, token="hf_stub"):
        environment = os.environ | own | {"HF_TOKEN": token, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
        called = [sys.executable, "-m", "irpo_utils", *arguments]
        return subprocess.run(called, cwd=ROOT, env=environment, capture_output=True, text=True)

    yield server.store, command
    server.shutdown()
    server.server_close()


def test_an_export_is_pushed_as_it_is_to_a_private_repository(micro_run, tmp_path, hub):
    store, command = hub
    done = command("export", micro_run[0].name, str(tmp_path / "model"), "push=me/mine")
    assert done.returncode == 0 and "/me/mine" in done.stdout, done.stderr
    assert store["repo"]["visibility"] == "private" and store["repo"]["type"] == "model"
    assert store["commit"].startswith("/api/models/me/mine/commit/main")
    assert store["files"] == {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= set(store["files"])


def test_pairs_are_pushed_as_a_data_set_that_loads(micro_run, tmp_path, hub):
    store, command = hub
    done = command("pairs", micro_run[0].name, str(tmp_path / "pairs.jsonl"), "form=messages", "push=me/mine")
    assert done.returncode == 0, done.stderr
    assert store["repo"]["type"] == "dataset" and store["commit"].startswith("/api/datasets/me/mine/commit/main")
    assert set(store["files"]) == {"train.jsonl", "README.md"}
    (tmp_path / "there").mkdir()
    for name, content in store["files"].items():
        (tmp_path / "there" / name).write_bytes(content)
    rows = load_dataset(str(tmp_path / "there"), split="train", cache_dir=str(tmp_path / "cache"))
    assert (
        len(rows) == len((tmp_path / "pairs.jsonl").read_text().splitlines())
        and rows[0]["chosen"][0]["role"] == "assistant"
    )


def test_a_push_that_fails_keeps_what_was_written_and_says_how_to_send_it(micro_run, tmp_path, hub):
    _, command = hub
    done = command("pairs", micro_run[0].name, str(tmp_path / "pairs.jsonl"), "push=me/mine", token="hf_wrong")
    assert done.returncode == 2 and "error: push: me/mine: " in done.stderr and "Traceback" not in done.stderr
    assert f"the files are in {tmp_path}; `hf auth login`, then `hf upload` sends them" in done.stderr
    assert (tmp_path / "pairs.jsonl").is_file()
    done = command("pairs", micro_run[0].name, str(tmp_path / "more.jsonl"), "push=no/such/name")
    assert done.returncode == 2 and "error: push: no/such/name: " in done.stderr
