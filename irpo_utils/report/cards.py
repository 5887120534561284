"""The card of a model or preference data that leaves a run, from its manifests: what was not measured is not in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, RepoCard

from ..files import file_hash, resolve, write_text
from ..model.packaged import EMBEDDED, NAMED
from ..run.stages import STAGES, EvaluateStage, PairsStage
from ..run.store import Stage, stages_of_m0


def model_card(stage: Stage, path: Path) -> None:
    """Write the README of M_t as one whole model in bfloat16."""
    base, t = stage.config.model.path, stage.iteration
    front = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base != EMBEDDED and not resolve(base).is_dir():
        front["base_model"] = NAMED[base].hub if base in NAMED else base
    found = {i: result(EvaluateStage, stage, i, "evaluation.json") for i in dict.fromkeys((0, t))}
    evaluated = [(i, split, row) for i, splits in found.items() for split, row in splits.items() if found[t]]
    facts = {} if evaluated else {"accuracy": "not measured"}
    if base in NAMED:
        facts["base weights"] = f"those of the package {NAMED[base].module}, rounded to four bits and unpacked"
    write_card(stage, path, front, what=f"M_{t}", evaluated=evaluated, facts=facts)


def pairs_card(stage: Stage, path: Path, form: str) -> None:
    """Write the README of a round's pairs."""
    front = {"configs": [{"config_name": "default", "data_files": "train.jsonl"}]}
    audit = result(PairsStage, stage, stage.iteration, "audit.json")
    write_card(stage, path, front, what=f"Pairs of iteration {stage.iteration}", facts={"form": form, **audit})


def write_card(stage: Stage, path: Path, front: dict[str, Any], **facts: Any) -> None:
    """Write `card.md` with what both have: base model, recipe, data, seed, licence, command and parameters."""
    base, source, run = stage.config.model.path, stage.config.pairs.file or stage.config.task.name, stage.run_folder
    own = base == EMBEDDED and stage.config.task.generated and not stage.config.pairs.file
    licence = "apache-2.0" if own else f"not recorded; those of {base} and of {source} hold"
    if why := maker(stage).why_not_done():
        facts["facts"] |= {"note": f"the parameters below are not quite those that it was made with ({why[0]})"}
    if stage.config.sampling.calculator:
        facts["facts"] |= {"measured": "with a calculator that writes results (sampling.calculator)"}
    facts |= {"recipe": stage.recipe, "choices": stage.recipe.round(max(1, stage.iteration)), "seed": stage.seed}
    facts |= {"base": base, "source": source, "licence": licence, "run": run.name}
    facts["config"] = (run / "config.yaml").read_text()
    data = CardData(tags=["preference-optimization"], license=licence if own else None, **front)
    write_text(path, str(RepoCard.from_template(data, str(Path(__file__).with_name("card.md")), **facts)))


def maker(stage: Stage) -> Stage:
    """The stage that made what leaves: a round's last but its evaluation; of M_0 its warm start, or its evaluation."""
    if not stage.iteration:
        names = stages_of_m0(stage.config)[:1]
    else:
        names = stage.choices.stages(stage.config.train.sync_every)[-2:-1]
    return STAGES[names[0]](stage.run_folder, stage.method, stage.seed, stage.iteration)


def result(kind: type[Stage], of: Stage, t: int, name: str) -> dict[str, Any]:
    """A JSON file that round t left; nothing unless the manifest names it, and an evaluation's the policy, as it is."""
    stage = kind(of.run_folder, of.method, of.seed, t)
    path, manifest = stage.folder / name, stage.manifest()
    if not manifest or not path.is_file() or manifest["outputs"][name] != file_hash(path):
        return {}
    policy = stage.input("policy") if kind is EvaluateStage else None
    same = policy is None or manifest["key"]["inputs"].get("policy") == file_hash(policy)
    return json.loads(path.read_text()) if same else {}
