"""Chunks that are drawn by Ray actors: the same bytes, whoever draws them and whatever dies. Skipped without Ray, but
for what shows that chunks can travel at all.

pip install -e ".[ray]" && ./run_all.sh --test tests/test_workers.py
"""

import contextlib
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, drive

from irpo_utils import files
from irpo_utils.extras import cluster, workers
from irpo_utils.extras.judge import Judging, judge_questions, written_scores
from irpo_utils.extras.process import simulation
from irpo_utils.files import ConfigError, file_hash
from irpo_utils.methods import parts, sampler
from irpo_utils.methods.rationalize import rationalized
from irpo_utils.methods.rewards import Job
from irpo_utils.model.records import Sample
from irpo_utils.run import store
from irpo_utils.run.presets import load_preset
from irpo_utils.run.stages import EvaluateStage, RewardStage, SampleStage

HERE = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HERE, reason="no Ray (pip install -e '.[ray]')")
SMALL = ["task.train_size=32", "sampling.max_rows=8"]  # chunks of eight problems
STORE = 1 << 27
PATIENCE = 240.0
# Stories whose grading waits, once a chunk is in its file, for as long as there is a file `hold` beside them.
HELD = """
import os, sys, time
from pathlib import Path
from irpo_utils.tasks.stories import Stories

HERE = Path(__file__).parent

class Held(Stories):
    def extract(self, response, problem, flexible=False):
        while (HERE / "hold").exists() and list(HERE.glob("**/chunk_*.jsonl")):
            node = sys.modules["ray"].get_runtime_context().get_node_id() if "ray" in sys.modules else "here"
            part = HERE / f"part_{os.getpid()}"
            part.write_text(node)
            part.rename(HERE / f"held_{os.getpid()}")
            time.sleep(0.05)
        return super().extract(response, problem, flexible)
"""


@pytest.fixture
def held(tmp_path):
    """The name of a task that holds its graders, and its folder."""
    (tmp_path / "held.py").write_text(HELD)
    return f"task.name={tmp_path / 'held.py'}:Held", tmp_path


def stage_of(kind, run, *settings, **where):
    files.write_text(run / "config.yaml", store.dump(load_preset("micro", [*SMALL, *settings])))
    return kind(run, **where)


def made(stage):
    """The hash of everything that the stage leaves."""
    stage.begin()
    stage.run()
    stage.finish()
    return {name: file_hash(stage.path(name)) for name in stage.writes()}


def until(there):
    """What `there` gives, once it is something."""
    end = time.monotonic() + PATIENCE
    while not (found := there()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
    return found


@contextlib.contextmanager
def meanwhile(work):
    """Run `work` in a thread beside the block; what it raises is raised behind the block."""
    failed = []

    def run():
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(PATIENCE)
    assert not failed, failed


@pytest.fixture
def machines(tmp_path_factory, monkeypatch):
    """Makes a Ray cluster here of as many machines as numbers of CPUs are given; the first is the head."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    found = []

    def start(*cpus):
        options = {"include_dashboard": False, "object_store_memory": STORE}
        with cluster.quick_imports(tmp_path_factory.mktemp("imports")):
            found.append(cluster_utils.Cluster(True, head_node_args={"num_cpus": cpus[0], **options}))
            for count in cpus[1:]:
                found[0].add_node(num_cpus=count, object_store_memory=STORE)
        monkeypatch.setenv("RAY_ADDRESS", found[0].address)
        return found[0]

    yield start
    for one in found:
        one.shutdown()


@needs_ray
def test_two_workers_leave_what_one_leaves_and_the_key_is_the_same(machines, tmp_path):
    machines(2)
    one, two = (stage_of(SampleStage, tmp_path / w, f"sampling.workers={w}") for w in "12")
    assert made(one) == made(two)
    assert one.manifest()["key"] == two.manifest()["key"] and "sampling.workers" not in one.key()["parameters"]
    assert one.is_done() and two.is_done()
    done = dict(cluster.run_commands({str(n): [sys.executable, "-c", f"exit({n})"] for n in (0, 3)}, 2, two.config))
    assert done == {"0": 0, "3": 3}


@needs_ray
def test_an_actor_that_is_killed_begins_its_chunk_again(machines, held, tmp_path):
    task, folder = held
    alone = made(stage_of(EvaluateStage, tmp_path / "one", task, iteration=0))
    for path in folder.glob("**/chunk_*.jsonl"):
        path.unlink()
    machines(2)
    (folder / "hold").touch()

    def kill():
        (first, *_) = until(lambda: list(folder.glob("held_*")))
        os.kill(int(first.name.removeprefix("held_")), signal.SIGKILL)
        (folder / "hold").unlink()

    with meanwhile(kill):
        assert made(stage_of(EvaluateStage, tmp_path / "two", task, "sampling.workers=2", iteration=0)) == alone


@needs_ray
@pytest.mark.long  # a minute
def test_a_machine_that_is_lost_loses_no_more_than_its_chunk(machines, held, tmp_path):
    """Nothing comes in its place: its chunk waits until the other worker has nothing more to do."""
    task, folder = held
    alone = made(stage_of(SampleStage, tmp_path / "one", task))
    ray = machines(0, 1, 1)
    (folder / "hold").touch()

    def lose():
        (first, *_) = until(lambda: list(folder.glob("held_*")))
        lost = next(node for node in ray.worker_nodes if node.node_id == first.read_text())
        ray.remove_node(lost, allow_graceful=False)
        (folder / "hold").unlink()

    with meanwhile(lose):
        assert made(stage_of(SampleStage, tmp_path / "two", task, "sampling.workers=2")) == alone


@needs_ray
def test_a_stage_that_is_killed_keeps_the_chunks_that_were_done(held, tmp_path):
    """Here Ray is the stage's own, and ends with it; one process goes on where two were at work."""
    task, folder = held
    alone = made(stage_of(SampleStage, tmp_path / "one", task))
    stage = stage_of(SampleStage, tmp_path / "two", task, "sampling.workers=2")
    (folder / "hold").touch()
    code = "import sys; from irpo_utils.run.stages import SampleStage; SampleStage(sys.argv[1]).begin().run()"
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "two")], cwd=ROOT, env=env) as process:
        pids = until(lambda: [int(path.name.removeprefix("held_")) for path in folder.glob("held_*")])
        process.kill()
    chunks = {path: path.stat().st_mtime_ns for path in stage.partial_folder().glob("chunk_*.jsonl")}
    assert 0 < len(chunks) < 4
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    (folder / "hold").unlink()
    stage = stage_of(SampleStage, tmp_path / "two", task)
    stage.begin()
    stage.run()
    assert chunks.items() <= {path: path.stat().st_mtime_ns for path in stage.partial.glob("chunk_*.jsonl")}.items()
    stage.finish()
    assert {name: file_hash(stage.path(name)) for name in stage.writes()} == alone


def travelled(other):
    """Stands in for Ray: chunks and what is done with them go through pickle, and so does what comes of them."""

    def spread(work, chunks):
        for path, chunk in sorted(chunks.items(), reverse=True):
            yield (
                path,
                pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(work))(other, pickle.loads(pickle.dumps(chunk))))),
            )

    return spread


@pytest.fixture
def job(config, task, tmp_path):
    """A reward's job on samples of M_0, and the same in a folder of its own whose chunks travel."""
    small = config.but(
        sampling=config.sampling.but(n=4, max_rows=4),
        judge=config.judge.but(read="text", samples=2, max_new_tokens=8),
        process=config.process.but(continuations=2),
    )
    problems = task.problems("train")[:12]
    with sampler.opened(small, None, task, problems) as here:
        samples = here.in_chunks({"": problems}, tmp_path / "drawn", n=4, temperature=1.0, seed=0)[""]
        prompts = here.prompts(problems)
    one = Job(small, None, task, problems, prompts, Sample.by_problem(samples), 1.0, 5, tmp_path / "one")
    return one, Travelling(
        **{name: getattr(one, name) for name in one.__dataclass_fields__} | {"folder": tmp_path / "two"}
    )


class Travelling(Job):
    @contextlib.contextmanager
    def sampler(self, *arguments, **named):
        with super().sampler(*arguments, **named) as here:
            yield replace(here, spread=travelled(here))


def test_what_rewards_draw_travels_and_is_the_same(job, tokenizer):
    one, two = job
    prefixes = {p.id: [s.token_ids[:3] for s in one.samples[p.id][:1]] for p in one.problems}
    assert simulation.simulate(one, tokenizer, prefixes) == simulation.simulate(two, tokenizer, prefixes)
    assert rationalized(one) == rationalized(two)
    questions = list(
        judge_questions(one.problems, [s for own in one.samples.values() for s in own][:9], "text").values()
    )
    scores = []
    for each in job:
        with each.sampler(None, Judging(each.config.task), questions) as asked:
            scores.append(written_scores(each.config, asked, questions, 7, each.folder / "judgements"))
    assert scores[0] == scores[1] and scores[0][1] > 0
    found = [sorted(path.relative_to(each.folder) for path in each.folder.glob("**/*_*.jsonl")) for each in job]
    assert found[0] == found[1] and len({path.parent for path in found[0]}) == 3


@pytest.mark.parametrize("kind", [SampleStage, RewardStage, EvaluateStage])
def test_where_it_is_drawn_is_in_no_key_and_how_a_model_is_split_is(kind, tmp_path):
    def parameters(*settings):
        return kind(tmp_path, "star", 0, 2, load_preset("micro", ["methods=star", *settings])).parameters()

    alone = parameters()
    assert parameters("sampling.workers=8", "sampling.gpus_per_worker=0.5") == alone
    assert not [name for name in alone if name.rpartition(".")[2] in ("workers", "gpus_per_worker", "url")]
    vllm = parameters("sampling.engine=vllm")
    assert parameters("sampling.engine=vllm", "sampling.gpus_per_worker=1") == vllm
    split = parameters("sampling.engine=vllm", "sampling.gpus_per_worker=4")
    assert split == vllm | {"sampling.tensor_parallel": 4}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampling.workers=0"], r"sampling\.workers: at least 1"),
        (["sampling.gpus_per_worker=2"], "only sampling.engine=vllm splits a model"),
        (
            ["sampling.gpus_per_worker=0.5", "sampling.engine=vllm"],
            "a part of a GPU is for sampling.engine=transformers",
        ),
        (["sampling.gpus_per_worker=-1"], r"sampling\.gpus_per_worker: at least 0"),
    ],
)
def test_numbers_of_workers_and_gpus_that_make_no_sense_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_preset("micro", overrides)


def test_without_ray_the_run_does_not_start(monkeypatch):
    def absent(name):
        raise cluster.PackageNotFoundError(name)

    monkeypatch.setattr(cluster, "version", absent)
    done = drive("micro", "run=test-workers", "sampling.workers=2")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert (
        'error: sampling.workers: ray is not installed; pip install -e ".[ray]", or set sampling.workers=1'
        in done.stderr
    )
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "error: jobs: ray is not installed" in drive("micro", "run=test-workers", "jobs=2").stderr
    monkeypatch.setattr(cluster, "version", lambda name: "2.60.0")
    monkeypatch.delenv("RAY_ADDRESS")
    both = drive("micro", "run=test-workers", "jobs=2", "sampling.workers=2")
    assert "set jobs=1 or sampling.workers=1" in both.stderr and not (ROOT / "outputs" / "test-workers").exists()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("", r"^sampling.workers: Ray does not start here \(timed out\); .* set sampling.workers=1; the same command"),
        ("10.0.0.1:6379", "^RAY_ADDRESS: timed out$"),
    ],
)
def test_a_ray_that_does_not_come_is_told_with_what_to_change(address, message, monkeypatch):
    def init(**options):
        raise Exception("timed out")  # what Ray itself raises

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=message), cluster.connected(2):
        pass


def test_the_table_names_it():
    assert parts.WORKERS.load() is workers.opened and parts.COMMANDS.load() is cluster.run_commands
    assert files.load_object(parts.WORKERS.check) is cluster.check
    here, vllm = parts.SAMPLERS["transformers"], parts.SAMPLERS["vllm"]
    assert here.opener(load_preset("micro")) is sampler.opened
    assert {each.opener(load_preset("micro", ["sampling.workers=2"])) for each in (here, vllm)} == {workers.opened}
