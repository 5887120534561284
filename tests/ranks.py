"""Processes that train together, for tests: forked from one that has imported the libraries, they meet over gloo."""

import os
import socket
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from small_models import SHAPE
from transformers import AutoModelForCausalLM, LlamaConfig

from irpo_utils.files import read_jsonl
from irpo_utils.methods.parts import LOSSES
from irpo_utils.model import load, processes, training
from irpo_utils.model.records import Pair
from irpo_utils.settings import ModelConfig, TrainConfig

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["irpo_utils.methods.trainer", "peft"])
LENGTHS = [(9, 5, 7), (9, 5, 3), (12, 6, 9), (12, 4, 5), (14, 7, 4), (9, 8, 6), (17, 3, 5), (14, 6, 6)]
STEPS = 4


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def as_rank(number, count, port, function, arguments):
    """What process `number` of `count` does: meet the others, then `function`."""
    torch.set_num_threads(1)
    named = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in named.items()})
    processes.join(count)
    found = function(*arguments)
    processes.leave()
    return found


def divide_weights():
    """From now on this process is one of an FSDP2 training.

    accelerate divides nothing on a CPU, by the name of the device alone: it is told another one.
    """
    processes.divide_weights()
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *ignored: ("gloo", DistributedType.MULTI_GPU)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)


def together(count, function, *arguments):
    """`function(*arguments)` in `count` processes at once; what each returned."""
    port = free_port()
    with ProcessPoolExecutor(count, CONTEXT) as pool:
        ranks = [pool.submit(as_rank, number, count, port, function, arguments) for number in range(count)]
        return [rank.result(timeout=120) for rank in ranks]


def small_policy(dtype=torch.float32):
    """A small Llama with random weights and an adapter that is no identity, the same in every process."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=40, **SHAPE)).to(dtype)
    model = load.new_adapter(model, ModelConfig(lora_r=4, lora_alpha=8), seed=1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.05)
    return model.to(dtype)


def small_pairs(pairs=True):
    """Eight pairs of unequal lengths on six prompts; or single responses."""

    def ids(count, first):
        return tuple((7 * first + 3 * i) % 37 + 3 for i in range(count))

    found = []
    for number, (prompt, chosen, rejected) in enumerate(LENGTHS):
        rejected_ids = ids(rejected, 11 + number) if pairs else ()
        found.append(
            Pair(f"p{prompt}", "", "", "", ids(prompt, prompt), ids(chosen, 5 + number), rejected_ids, None, None)
        )
    return found


def train(folder, loss, settings=None, dtype=torch.float64, **more):
    """Train the small policy with a loss of the table; facts, steps and the weights that were trained."""
    row = LOSSES[loss]
    config = TrainConfig(
        **{"batch": 8, "micro_batch": 2, "max_steps": STEPS, "max_epochs": 9, "eval_every": STEPS, "lr": 1e-2}
        | (settings or {})
    )
    model = more.pop("model", None) or small_policy(dtype)
    facts = training.train(
        model,
        small_pairs(row.pairs),
        folder,
        loss=row.load(),
        weights={name: getattr(config, name) for name in row.parameters},
        has_reference=row.reference,
        config=config,
        seed=0,
        sampled_by_start=False,
        show=lambda line: None,
        **more,
    )
    weights = {name: weight.clone() for name, weight in processes.trained(model).items()}
    return facts, read_jsonl(folder / "steps.jsonl"), weights
