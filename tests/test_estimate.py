"""What a run needs is known before it starts: parameters counted, presets that fit, refusals saying what to change."""

import pytest
from transformers import AutoConfig, LlamaConfig, Qwen2Config

from irpo_utils.files import PACKAGE, ConfigError
from irpo_utils.model.shape import Shape
from irpo_utils.run import estimate
from irpo_utils.run.driver import check_inputs
from irpo_utils.run.presets import REAL_MODELS, REAL_TASKS, load_preset
from irpo_utils.tasks import get_task

# The published shapes of the models that the presets name, so that no network is needed.
PUBLISHED = {
    "qwen2.5-0.5b": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
    ),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, head_dim=64, tie_word_embeddings=True,
    ),
    "llama-2-7b-chat": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096,
    ),
}  # fmt: skip
PROMPT = {
    "gsm8k": range(80, 351),
    "math": range(1100, 1701),
    "arc_challenge": range(90, 401),
    "mbpp": range(120, 601),
}  # tokens
SEED_MODEL = PACKAGE / "assets" / "seed_model"
CARD = 23.5 * estimate.GIB
ON_GPU = ("model.quantize=nf4", "model.dtype=bfloat16", "train.optimizer=paged_adamw_8bit")


@pytest.fixture(scope="module")
def shapes():
    return {name: Shape.of(config) for name, config in PUBLISHED.items()}


def test_parameters_are_counted_without_weights(shapes):
    counted = {name: shape.parameters for name, shape in shapes.items()}
    assert counted == {"qwen2.5-0.5b": 494_032_768, "llama-3.2-1b": 1_235_814_400, "llama-2-7b-chat": 6_738_415_616}


def test_the_seed_model_is_counted_right(seed_model):
    shape = Shape.of(AutoConfig.from_pretrained(SEED_MODEL))
    assert shape.parameters == seed_model.num_parameters()
    assert shape.cache == 2 * 4 * 128


@pytest.mark.parametrize("size", ["", "-paper"])
@pytest.mark.parametrize("model", REAL_MODELS)
@pytest.mark.parametrize("task", REAL_TASKS)
def test_presets_fit_a_24_gb_card(task, model, size, shapes):
    config = load_preset(f"{task}-{model}{size}", ON_GPU)
    lines = estimate.check_fits(shapes[model], config, PROMPT[task][-1], CARD)
    print(f"{task}-{model}{size}", *lines, sep="\n   ")
    assert [line.partition(":")[0] for line in lines] == ["sampling", "training", "dev score"]


@pytest.mark.parametrize(
    ("overrides", "gib", "message"),
    [
        (["sampling.max_rows=512"], 24, r"sampling: about .* does not fit; set sampling.max_rows=256 \(it is 512\)"),
        (
            ["train.gradient_checkpointing=false", "sampling.max_rows=2"], 12,
            "training: .* does not fit; set train.gradient_checkpointing=true",
        ),
        (["train.micro_batch=16", "sampling.max_rows=2"], 12, r"does not fit; set train.micro_batch=8 \(it is 16"),
        (["train.batch=18", "train.micro_batch=9", "sampling.max_rows=2"], 9, r"set train.micro_batch=3 \(it is 9"),
        (["model.quantize=none", "sampling.max_rows=1"], 10, "does not fit; set model.quantize=nf4"),
        (["sampling.max_rows=1"], 4, "does not fit; take a smaller model"),
        (["sampling.max_new_tokens=4000"], 99, "exceed the model's context of 4096; lower the latter to 3746"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_with_what_to_change(overrides, gib, message, shapes):
    given = {item.partition("=")[0] for item in overrides}
    config = load_preset(
        "gsm8k-llama-2-7b-chat", [*(o for o in ON_GPU if o.partition("=")[0] not in given), *overrides]
    )
    with pytest.raises(estimate.TooLarge, match=message):
        estimate.check_fits(shapes["llama-2-7b-chat"], config, 350, gib * estimate.GIB)


def test_processes_that_share_a_machine_share_its_memory(shapes, monkeypatch):
    def line(stage, *settings):
        config = load_preset("gsm8k-qwen2.5-0.5b", ["model.quantize=none", "train.micro_batch=1", *settings])
        lines = estimate.check_fits(shapes["qwen2.5-0.5b"], config, 350, CARD)
        return next(line for line in lines if line.startswith(stage))

    for cuda, launcher, memory in ((False, "", "11.8"), (True, "", "23.5"), (False, "torchrun", "23.5")):
        monkeypatch.setattr(estimate.torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setenv("IRPO_LAUNCHER", launcher)
        alone = line("training").replace("23.5", memory)
        assert line("training", "train.processes=2") == alone and f" of {memory} GiB" in alone
        assert f" of {memory} GiB" in line("dev score", "train.processes=2")
        assert " of 23.5 GiB" in line("sampling", "train.processes=2")
    monkeypatch.delenv("IRPO_LAUNCHER")
    monkeypatch.setattr(estimate.torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        estimate.TooLarge, match=r"training: .*; lower train.processes \(it is 16, and each holds as much"
    ):
        line("training", "train.processes=16")


def test_memory_grows_with_what_should_cost_memory(shapes):
    config, shape = load_preset("gsm8k-qwen2.5-0.5b", ON_GPU), shapes["qwen2.5-0.5b"]
    more = config.but(train=config.train.but(micro_batch=2 * config.train.micro_batch))
    assert (
        estimate.training_bytes(shape, more)["activations"] == 2 * estimate.training_bytes(shape, config)["activations"]
    )
    rows = config.but(sampling=config.sampling.but(max_rows=2 * config.sampling.max_rows))
    cache = [estimate.sampling_bytes(shape, c, 350, CARD)["cache"] for c in (config, rows)]
    assert cache[1] == 2 * cache[0]


def test_a_model_that_is_given_is_looked_at_and_counted(monkeypatch):
    config = load_preset("micro", [f"model.path={SEED_MODEL}"])
    task = get_task(config.task)
    problems = {split: task.problems(split) for split in ("train", "dev", "test")}
    lines, _ = estimate.check_model(config, task, problems, jobs=1)
    assert lines[0].startswith("estimate, from the model's shape (1 M parameters; prompts of ")
    assert [line.strip().partition(":")[0] for line in lines[1:]] == ["sampling", "training", "dev score"]
    with pytest.raises(estimate.TooLarge, match="does not fit; .* jobs=1 fits"):  # a thousandth of the memory for each
        estimate.check_model(config, task, problems, jobs=1000)
    large = load_preset(
        "micro", [f"model.path={SEED_MODEL}", "irpo.train.micro_batch=1000000", "irpo.train.batch=1000000"]
    )
    with pytest.raises(ConfigError, match="irpo, round 1: .*training: .*does not fit"):  # a method's own, too
        check_inputs(large)
    monkeypatch.setattr(estimate, "free_memory", lambda: 8 * estimate.GIB)
    _, jobs = estimate.check_model(config, task, problems, jobs=9, or_fewer=True)
    assert 1 < jobs < 6  # each keeps a reserve of 1.5 GiB
