"""ExPO: a better model without training, beyond th_1 on the line from th_0 (arXiv 2404.16792, Eq. 1).

    th = th_1 + a (th_1 - th_0)

th_0 is what th_1 was trained from (the paper: the SFT model), or any model before it: M_3 beyond M_2, or beyond the
base. Two LoRA adapters on one base give one adapter on it, and exactly: with D_i = s_i B_i A_i the change that adapter
i makes, (1 + a) D_1 - a D_0 is the product of the stacked [(1 + a) s_1 B_1, -a s_0 B_0] and [A_1; A_0], of rank
r_1 + r_0. Base weights are neither read nor changed, so they may be in 4 bits. Which a is best is for dev data to say;
that search is left out here.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..files import ConfigError, MissingArtefact
from ..model import load
from ..settings import ModelConfig

Weights = dict[str, torch.Tensor]


def extrapolated(
    config: ModelConfig, policies: tuple[Path, Path | None], a: float, target: Path
) -> dict[str, float | int]:
    """The part of a round that trains nothing: write th_1 + a (th_1 - th_0) to `target`, in place of what was there.

    Args:
        policies: th_1 and th_0, as for `extrapolate`.

    Returns:
        The facts that a training leaves: `a`, no token trained on, and no step.
    """
    shutil.rmtree(target, ignore_errors=True)  # a killed stage may have left one
    extrapolate(config, *policies, a, target)
    return {"a": a, "trained_tokens": 0, "best_step": 0}


def extrapolate(config: ModelConfig, th_1: Path, th_0: Path | None, a: float, target: Path) -> None:
    """Write th_1 + a (th_1 - th_0) to the folder `target`, in the form of th_1: an adapter, or a whole model.

    Args:
        config: used for whole models only: the base where th_0 is None, and the dtype of the result.
        th_1, th_0: folders of policies, both adapters (of any ranks) on one base, or both whole models. A th_0 of None
            is the base.
        a: how far beyond th_1, as a share of the way from th_0; 0 gives th_1, -1 th_0.

    Raises:
        ConfigError: the two have no common base or form, or other weights.
    """
    for folder in (th_1, th_0):
        if folder is not None and not (load.is_adapter(folder) or (folder / "config.json").is_file()):
            raise MissingArtefact(f"{folder} holds no policy (neither adapter_config.json nor config.json)")
    if th_0 is not None and load.is_adapter(th_1) != load.is_adapter(th_0):
        raise ConfigError(
            f"extrapolate: {th_1} and {th_0} are an adapter and a whole model; "
            "take two of one kind (see ./run_all.sh export)"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        fresh = Path(folder) / "policy"  # so that no half of a policy is ever found
        try:
            if load.is_adapter(th_1):
                _adapters(th_1, th_0, a, fresh)
            else:
                _whole_models(config, th_1, th_0, a, fresh)
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            both = f"{th_1} or {th_0}" if th_0 else th_1
            raise MissingArtefact(
                f"{both} is damaged ({type(error).__name__}: {error}); copy or train it again"
            ) from None
        for file in fresh.glob("*.safetensors"):
            if not all(torch.isfinite(weight).all() for weight in load_file(file).values()):
                raise ConfigError(f"extrapolate: the weights are not finite at a = {a:g}; take a smaller one")
        fresh.rename(target)


def _whole_models(config: ModelConfig, th_1: Path, th_0: Path | None, a: float, target: Path) -> None:
    model, before = load.load_policy(config, th_1), load.load_policy(config, th_0)
    earlier = dict(before.named_parameters())
    later = dict(model.named_parameters())
    _check_same(th_1, {n: p.shape for n, p in later.items()}, th_0, {n: p.shape for n, p in earlier.items()})
    with torch.no_grad():
        for name, p in later.items():
            p.copy_(p.float() + a * (p.float() - earlier[name].float()))  # rounded once, to the model's dtype
    model.save_pretrained(target)


def _check_same(th_1: Path, later: dict[str, Any], th_0: Path | None, earlier: dict[str, Any]) -> None:
    """Raise a ConfigError that names the first weight that one of two models has and the other has not."""
    for name in sorted(later.keys() | earlier.keys()):
        if later.get(name) != earlier.get(name):
            shapes = [tuple(w[name]) if name in w else "none" for w in (later, earlier)]
            raise ConfigError(f"extrapolate: {name} is {shapes[0]} in {th_1} but {shapes[1]} in {th_0 or 'the base'}")


def _read(folder: Path) -> tuple[dict[str, Any], Weights, float]:
    """An adapter's settings, its weights by name, and the factor s of its B A. Refuses what is more than B A."""
    facts = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    plain = facts["peft_type"] == "LORA" and not any(
        facts.get(k) for k in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out")
    )
    if not plain or not all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in weights):
        raise ConfigError(f"extrapolate: {folder} is not a plain LoRA adapter (of B and A alone, one rank for all)")
    return facts, weights, facts["lora_alpha"] / (math.sqrt(facts["r"]) if facts.get("use_rslora") else facts["r"])


def _outer_shapes(weights: Weights) -> dict[str, Any]:
    """The shapes of an adapter's weights without their ranks, which may differ."""
    return {name: (w.shape[1:] if ".lora_A." in name else w.shape[:1]) for name, w in weights.items()}


def _adapters(th_1: Path, th_0: Path | None, a: float, target: Path) -> None:
    """The adapter (1 + a) D_1 - a D_0, of rank r_1 + r_0; where th_0 is the base, D_0 is 0."""
    facts, later, s_1 = _read(th_1)
    parts = [((1 + a) * s_1, later)]
    if th_0 is not None:
        other, earlier, s_0 = _read(th_0)
        bases = [f["base_model_name_or_path"] for f in (facts, other)]
        if bases[0] != bases[1]:
            raise ConfigError(f"extrapolate: {th_1} is on the base {bases[0]}, {th_0} on {bases[1]}")
        _check_same(th_1, _outer_shapes(later), th_0, _outer_shapes(earlier))
        parts.append((-a * s_0, earlier))
    # peft's add_weighted_adapter("cat") gives the same numbers, but only inside a loaded base, whose gigabytes are not
    # needed here. It is not shorter either: there a weight that one adapter lacks counts as zero, so the checks stay.
    weights = {}
    for name in later:
        if ".lora_A." in name:
            weights[name] = torch.cat([w[name].float() for _, w in parts], 0)
        else:
            weights[name] = torch.cat([s * w[name].float() for s, w in parts], 1)
    rank = next(t.shape[0] for n, t in weights.items() if ".lora_A." in n)
    target.mkdir(parents=True)
    save_file(weights, target / "adapter_model.safetensors", metadata={"format": "pt"})
    facts |= {"r": rank, "lora_alpha": rank, "use_rslora": False}  # the factor is in B
    (target / "adapter_config.json").write_text(json.dumps(facts, indent=1, sort_keys=True))
