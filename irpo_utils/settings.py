"""Every parameter of a run, with its type, range and default: one section a class. Frozen, and checked when it is made.

`run/config.py` reads them from presets and from the command line. What is wrong with one is said in plain words
(`first_error`), here and for the recipes of `methods/`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

VERSIONS = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "accelerate")  # make what a model computes
MATH_VERSIONS = ("math-verify", "latex2sympy2_extended", "sympy")  # of what checks LaTeX answers
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for
EXECUTIONS = ("isolated", "i-accept-the-risk")  # how sampled programs are run, see extras/code/sandbox.py
# Parameters that say where something is computed or shown, and not what comes of it: they are in no stage's key.
PLACES = {"sampling": ("url", "workers", "gpus_per_worker"), "train": ("report_to",)}


def _several(value: Any) -> Any:
    """A value alone is a list of one; an empty one is none."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return tuple(v for v in values if v != "")


Count = Annotated[int, Field(ge=1, le=1_000_000)]
Size = Annotated[int, Field(ge=0, le=1_000_000)]  # 0 takes all there are, or sets no limit
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(_several)]


class Section(BaseModel):
    """Parameters that belong together. A change makes a new one, which is checked again: `section.but(lr=1e-3)`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"{name}: a run's parameters are fixed; change one in the cell of parameters, as in "
            'overrides = ["train.lr=1e-3"], or on the command line, ./run_all.sh tiny run=mine train.lr=1e-3'
        )

    def but(self, **changes: Any) -> Self:
        return type(self).model_validate(self.values() | changes)

    def values(self) -> dict[str, Any]:
        """The parameters by name, sections as they are."""
        return {name: getattr(self, name) for name in type(self).model_fields}


# Tasks that draw their problems, and the further test sets that each of them has.
GENERATED: dict[str, tuple[str, ...]] = {"stories": ("long",)}
FROM_FILES = ("jsonl", "refined", "refined_stories")  # tasks without a source of their own


class TaskConfig(Section):
    name: str = "stories"  # one of tasks.TASKS, or a class of your own: my_task.py:MyTask
    train: Names = ()  # files or hub data sets; none: the task's own
    dev: Names = ()  # none: `dev_size` problems are held out of training
    test: Names = ()  # none, for a task without sources of its own: `test_size` problems are held out of training
    train_size: Size = 1000  # problems; 0 takes all there are
    dev_size: Size = 200  # problems that learning rates and the step that is kept are chosen on
    test_size: Size = 300  # problems that results are reported on
    seed: int = 0  # which problems are held out, and which are taken when a size cuts
    by_seed: bool = False  # whether each random seed of the run has problems of its own
    flexible: bool = False  # whether the reward, too, accepts an answer that is not marked
    # How sampled programs are run.
    execution: Literal["isolated", "i-accept-the-risk"] = Field(
        "isolated", description="the latter runs programs without isolation"
    )
    guessable_share: Share = 0.1  # stories: share of problems that ask "odd or even?"

    @property
    def generated(self) -> bool:
        return self.name in GENERATED

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.name in FROM_FILES and not self.train:
            raise ValueError(f"task.train: the {self.name} task needs a file, as in task.train=problems.jsonl")
        if self.generated and (self.train or self.dev or self.test):
            raise ValueError(
                f"task.train, task.dev, task.test: {self.name} are generated; set task.name=jsonl for a file"
            )
        if self.generated and min(self.train_size, self.dev_size, self.test_size) < 1:
            raise ValueError(f"task: train_size, dev_size and test_size at least 1, since {self.name} are drawn")
        return self


class ModelConfig(Section):
    path: str = Field(
        "seed",
        min_length=1,
        description='a hub name, a folder, "seed" (the embedded model) or "smollm2" (from a package of its own); '
        "with {seed} in it one for each seed",
    )
    tuning: Literal["lora", "full"] = "lora"  # "full" for a model small enough to save whole
    quantize: Literal["none", "nf4", "auto"] = "none"  # "nf4": 4-bit base (QLoRA); "auto": nf4 where CUDA is, else none
    dtype: Literal["float32", "bfloat16", "auto"] = (
        "float32"  # "auto": bfloat16 where CUDA is, or a CPU with AMX or AVX512-BF16. Adapters are float32 in any case
    )
    trust_remote_code: bool = False  # whether code that comes with the model may run
    lora_r: Count = 32  # rank of the adapter
    lora_alpha: Count = 64  # the adapter counts lora_alpha / lora_r times

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        if self.quantize != "none" and self.tuning == "full":
            raise ValueError("model.quantize: 4-bit weights cannot be trained; set model.tuning=lora")
        return self


class WarmStartConfig(Section):
    """What M_0 is: the base, or an adapter of it, trained on gold solutions of problems that the loop never sees."""

    # Taken from the training problems; the loop has the rest.
    problems: Size = Field(0, description="0: M_0 is the base")
    lr: Positive = 3.0e-4  # learning rate
    max_steps: Count = 40  # optimizer steps
    eval_every: Count = 10  # the step that is best on dev is M_0


class SamplingConfig(Section):
    # What samples and evaluates: "transformers" in this process; "vllm" in one of its own, for which IRPO_VLLM_PYTHON
    # may name a Python that has it (pyproject.toml: how to make one); "server": one that is running already, at `url`
    # (site/pages/clusters.md). Dev scores while training: always the first.
    engine: Literal["transformers", "vllm", "server"] = "transformers"
    url: str = ""  # of a server, as http://node1:8000
    workers: Count = 1  # processes that draw chunks of problems, on all machines of a Ray cluster; 1: the stage's own
    # GPUs that each of them takes: 0 on a CPU, 0.5 for two on one GPU; 2 or more split the model of an engine that can.
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    n: Count = 16  # N: samples of each problem
    temperature: Annotated[tuple[Positive, ...], BeforeValidator(_several), Field(min_length=1)] = (
        0.8,
    )  # per iteration; the last one goes on
    max_new_tokens: Count = 64  # of a response; a longer one is cut off, unfinished
    max_rows: Count = 512  # responses at once, at most
    # Whether the result behind an arithmetic expression and "=" is computed and not drawn; it is not trained on.
    calculator: bool = False

    @property
    def tensor_parallel(self) -> int:
        """GPUs that one model is split over."""
        return max(1, int(self.gpus_per_worker))

    @model_validator(mode="after")
    def _placed(self) -> Self:
        gpus = self.gpus_per_worker
        if (self.engine == "server") != bool(self.url):
            raise ValueError(
                "sampling.url: where the server is, for sampling.engine=server alone, as http://node1:8000"
            )
        if self.calculator and self.engine != "transformers":
            raise ValueError(
                "sampling.calculator: it writes into responses as they are drawn; set sampling.engine=transformers"
            )
        if self.engine == "server" and self.workers > 1:
            raise ValueError("sampling.workers: a server draws everything at once by itself; leave it at 1")
        if self.engine == "transformers" and gpus > 1:
            raise ValueError("sampling.gpus_per_worker: at most 1, since only sampling.engine=vllm splits a model")
        if gpus != int(gpus) and (gpus > 1 or self.engine == "vllm"):
            raise ValueError(
                f"sampling.gpus_per_worker: a part of a GPU is for sampling.engine=transformers, got {gpus}"
            )
        return self


class PairsConfig(Section):
    file: str = ""  # preference data, a file or a hub data set, that is trained on in place of the model's own samples
    k: Count = 8  # K: pairs of each problem, at most
    eta: Positive = 0.2  # least difference of two rewards that makes a pair, where rewards are not just right and wrong
    least_votes: Share = 0.5  # least share of a problem's samples that a winner by votes has
    max_per_problem: Count = 10  # correct samples of a problem that ReST-EM takes
    gold: bool = False  # whether the gold solution joins the winners
    max_tokens: Count = 128  # longer prompt + response: dropped and counted, never cut
    max_pairs: Size = Field(0, description="0 for no cap")  # random cap on pairs per iteration


class ProcessConfig(Section):
    """Process feedback (SIPF): step labels by simulation, and the process reward model that is trained on them."""

    continuations: Count = 8  # K: from the end of every step; the paper's code implies 8 for maths, 6 for code
    delta: Size = 0  # a step is right if more than so many of its continuations reach the right answer
    temperature: Positive = 1.0  # of the continuations
    simulator: str = ""  # who continues: "" is the policy M_t itself, else a hub name or a folder
    labels: Literal["process", "outcome"] = (
        "process"  # "outcome", the control: every step has its answer's label, and nothing is simulated
    )
    path: Literal["mean", "min", "product", "last"] = (
        "mean"  # a path's reward from its steps' scores; mean is the paper's
    )
    lr: Positive = 5.0e-5  # the paper's
    lora_r: Count = 16  # the paper's
    batch: Count = 32  # solutions per optimizer step
    max_steps: Count = 2000  # optimizer steps, at most
    max_epochs: Count = 3  # passes over the solutions, at most

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.delta >= self.continuations:
            raise ValueError("process.delta: at least 0 and below process.continuations")
        return self


class JudgeConfig(Section):
    """Self-Rewarding: the model as its own judge, on a scale from 0 to 5."""

    samples: Count = 3  # judgements that are averaged
    temperature: Positive = 0.7  # of the judgements
    # "text": a judgement is written out and its "Score: n" read. "scores": n is drawn from the model's own
    # probabilities of the six scores behind the prompt, for a model that cannot write a judgement.
    read: Literal["text", "scores"] = "text"
    max_new_tokens: Count = 256  # of a judgement


class TrainConfig(Section):
    engine: Literal["own", "trl"] = "own"  # "trl": its DPOTrainer, ORPOTrainer or GRPOTrainer
    lr: Positive = 1.0e-3  # learning rate
    beta: Positive = 0.1  # how strongly DPO holds the policy to its reference
    alpha: Annotated[float, Field(ge=0)] = 1.0  # weight of the NLL term
    odds_weight: Annotated[float, Field(ge=0)] = 0.1  # lambda of ORPO's odds ratio term; the other losses have none
    gamma: Annotated[float, Field(ge=0)] = 1.0  # of SimPO: what the winner's reward is to be ahead by
    bar: Annotated[float, Field(ge=0)] = 50.0  # lambda of DPO-Positive: what a winner below its reference costs
    penalty: Annotated[float, Field(ge=0)] = 0.05  # of ExMATE: weight of the loser's probability per token
    # Pairs per optimizer step; where nothing is rejected, twice as many responses: as many tokens for every method.
    batch: Count = 16
    micro_batch: Count = 16  # pairs per forward pass (or twice as many responses)
    # Each takes batch / processes of every batch's pairs, micro_batch of them at a time (all, if they are fewer).
    processes: Count = 1
    shard: bool = False  # whether the base is divided over the processes; else each holds all of it
    pairs_together: Count = 1  # pairs of one problem that come together: they share its prompt, for a noisier gradient
    max_steps: Count = 250  # optimizer steps, at most
    max_epochs: Count = 4  # passes over the pairs, at most
    extrapolation: float = 0.3  # a of ExPO; the paper: 0.3 to 0.5
    warmup: Share = 0.1  # share of the steps
    max_grad_norm: Positive = 1.0  # gradients are clipped to this norm
    # Optimizer steps between fresh draws of the policy that is trained (online: 1); 0: the policy is sampled once,
    # before. Where it is above 0 there are max_steps steps, and max_epochs and pairs_together have nothing to say.
    sync_every: Size = 0
    eval_every: Count = 50  # steps between dev scores; the best step becomes M_{t+1}
    retrain_with_dev: bool = (
        False  # then train anew for as many steps with the dev problems included, as the paper does
    )
    optimizer: Literal["adamw", "paged_adamw_8bit", "auto"] = "adamw"  # "auto": the latter where CUDA is
    gradient_checkpointing: bool = False  # less memory, about a third more time
    report_to: Names = ()  # where steps are shown as they come: tensorboard, wandb, trackio; no result depends on it

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch % self.micro_batch:
            raise ValueError("train.batch: a multiple of train.micro_batch")
        if self.processes > 1 and self.engine != "own":
            raise ValueError(f"train.processes: {self.engine} trains in one process; set train.engine=own")
        if self.sync_every and (self.processes > 1 or self.engine != "own" or self.retrain_with_dev):
            raise ValueError(
                "train.sync_every: where the policy draws while it is trained, leave train.processes at 1, "
                "train.engine at own and train.retrain_with_dev at false"
            )
        if self.processes > self.batch:
            raise ValueError(f"train.batch: at least one pair for each of train.processes={self.processes}")
        at_once = self.processes * self.own_micro_batch(self.processes)
        if self.batch % at_once:
            raise ValueError(
                f"train.batch: a multiple of train.processes x train.micro_batch ({self.processes} x "
                f"{at_once // self.processes} = {at_once}), got {self.batch}"
            )
        if self.shard and self.processes == 1:
            raise ValueError("train.shard: there is one process; set train.processes")
        if self.shard and self.optimizer == "paged_adamw_8bit":
            raise ValueError("train.shard: its weights are not for 8-bit AdamW; set train.optimizer=adamw")
        return self

    def own_micro_batch(self, processes: int) -> int:
        """Pairs per forward pass of each of so many processes: at most its part of the batch."""
        return min(self.micro_batch, self.batch // processes)


class EvaluationConfig(Section):
    samples: Count = 32  # of each problem, for maj@k and pass@k
    temperature: Positive = 0.8  # of the samples
    test: Names = ()  # further test sets, each a file or hub data set in the form of the task's own
    test_size: Size = 0  # problems of each of them; 0 takes all

    @model_validator(mode="after")
    def _apart(self) -> Self:
        names = [os.path.normpath(source) for source in self.test]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"evaluation.test: {name} is there twice")
            if name in ("dev", "test"):
                raise ValueError(f"evaluation.test: {name} is what the run's own problems are called; rename the file")
        return self


class Settings(Section):
    """All that a stage may look at."""

    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    sampling: SamplingConfig = SamplingConfig()
    pairs: PairsConfig = PairsConfig()
    process: ProcessConfig = ProcessConfig()
    judge: JudgeConfig = JudgeConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    seeds: Annotated[int, Field(ge=1, le=10_000)] = 1  # how many random seeds, from 0: each repeats the whole run
    iterations: Annotated[int, Field(ge=1, le=999)] = 3  # rounds of the loop; random seeds are apart up to the limit
    # CPU threads of a stage; part of what makes a rerun bit-identical.
    threads: Annotated[int, Field(ge=1, le=1024)] = 2

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.task.generated and (unknown := set(self.evaluation.test) - {*GENERATED[self.task.name]}):
            own = ", ".join(GENERATED[self.task.name]) or "none"
            raise ValueError(
                f"evaluation.test: {min(unknown)} is no further test set of {self.task.name}, which are generated "
                f"(there is: {own}); take a task that reads records"
            )
        if 0 < self.task.train_size <= self.warm_start.problems:
            raise ValueError(
                f"warm_start.problems: the warm start takes all {self.task.train_size} problems of task.train_size; "
                "lower it"
            )
        if self.train.shard and (self.model.quantize == "nf4" or self.model.tuning == "full"):
            raise ValueError(
                "train.shard: for an adapter on a base that is not quantized; "
                "set model.quantize=none and model.tuning=lora"
            )
        if (self.pairs.max_pairs or self.pairs.file) and self.train.sync_every:
            name = "pairs.file" if self.pairs.file else "pairs.max_pairs"
            raise ValueError(f"{name}: a round with train.sync_every draws just what it trains on; set one of the two")
        if self.sampling.engine != "transformers" and self.train.sync_every:
            raise ValueError(
                "train.sync_every: the policy that is trained draws by itself; set sampling.engine=transformers"
            )
        if self.sampling.engine != "transformers" and self.model.quantize == "nf4":
            name = "vLLM" if self.sampling.engine == "vllm" else "a server"
            raise ValueError(
                f"sampling.engine: {name} would not run the 4-bit weights that are trained; "
                "set model.quantize=none or sampling.engine=transformers"
            )
        if self.sampling.engine == "server" and self.model.tuning == "full":
            raise ValueError(
                "sampling.engine: a server takes an adapter while it runs and no whole model; "
                "set model.tuning=lora or sampling.engine=transformers"
            )
        if self.sampling.engine == "vllm" and self.model.tuning == "lora" and self.model.lora_r > LORA_RANKS[-1]:
            raise ValueError(
                f"sampling.engine: vLLM takes a model.lora_r of up to {LORA_RANKS[-1]}; "
                "lower it or set sampling.engine=transformers"
            )
        return self

    def temperature(self, iteration: int) -> float:
        """The sampling temperature of iteration 1, 2, ...; the last one of the list goes on."""
        return self.sampling.temperature[min(iteration, len(self.sampling.temperature)) - 1]


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, or a list of; None for a single parameter."""
    kind = field.annotation
    kind = get_args(kind)[0] if get_origin(kind) is tuple else kind
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def field_of(model: type[Section], name: str) -> FieldInfo | None:
    """The field of a parameter, as of "train.lr"; None where there is none."""
    first, _, rest = name.partition(".")
    field = model.model_fields.get(first)
    if field is None or not rest:
        return field
    section = section_of(field)
    return section and field_of(section, rest)


def names_of(model: type[Section]) -> list[str]:
    """Every parameter, as "train.lr"."""
    names = []
    for name, field in model.model_fields.items():
        section = section_of(field)
        names += [f"{name}.{leaf}" for leaf in names_of(section)] if section else [name]
    return names


def unknown(name: str, known: Iterable[str]) -> str:
    """That there is no such parameter, and which one may be meant."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"no parameter is called {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def first_error(error: ValidationError, model: type[Section]) -> str:
    """The first thing wrong with the values of a `model`: the parameter, what it takes, and what it was given."""
    errors = error.errors()
    # A name that is mistyped is also missing; what it is mistyped as says more.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    name = ".".join(part for part in first["loc"] if isinstance(part, str))
    kind, given, limits = first["type"], first["input"], first.get("ctx") or {}
    if kind == "value_error":
        return str(limits["error"])
    if kind == "extra_forbidden":
        return unknown(name, names_of(model))
    if kind == "missing":
        return f"{name} is missing"
    if kind == "float_type" and isinstance(given, str):
        return f"{name}: expected a number, got the text {given!r}; YAML reads 1e-5 as text, write 1.0e-5"
    if kind == "too_short":
        return f"{name}: expected at least one value"
    field = field_of(model, name)
    hint = f" ({field.description})" if field and field.description else ""
    if kind == "string_too_short":
        return f"{name}: expected text that is not empty{hint}"
    if kind in ("greater_than_equal", "greater_than", "less_than_equal"):
        if kind == "less_than_equal" and limits["le"] != 1:
            return f"{name}: at most {limits['le']}, got {given}"
        low = f"at least {limits['ge']}" if "ge" in limits else f"above {limits['gt']:g}" if "gt" in limits else ""
        share = any(getattr(limit, "le", None) == 1 for limit in field.metadata)
        return f"{name}: {'between 0 and 1' if share else low}, got {given}{hint}"
    what = {
        "literal_error": f"one of {limits.get('expected', '').replace(chr(39), '').replace(' or ', ', ')}",
        "finite_number": "expected a finite number",
    }
    types = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "tuple": "a list"}
    types["model"] = "parameters as `key: value`"
    if wanted := types.get(kind.partition("_")[0]):
        what.setdefault(kind, f"expected {wanted}")
    return f"{name}: {what.get(kind, first['msg'])}, got {given!r}{hint}".removeprefix(": ")
