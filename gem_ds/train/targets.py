"""Which layers a run changes, how many entries of them, and whether that can be."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from gem_ds.distributed.weights import num_parameters
from gem_ds.files.mask import Mask
from gem_ds.models.blocks import block_sizes, model_of
from gem_ds.models.encoders import head_names, is_encoder, without_head
from gem_ds.models.targets import ALL_LINEAR, describe_reach, find_targets, targets_of
from gem_ds.select.budget import total_budget
from gem_ds.select.rules import SPARSE_METHODS
from gem_ds.train.config import DEFAULT_DENSITY, Arguments
from gem_ds.train.methods import ADAPTER_METHODS, DENSE_METHODS


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What of a model a run changes."""

    names: list[str]  # of the target weights; empty where the method has none
    num_parameters: int  # N
    budget: int = 0  # K; 0 for methods that train whole parameters
    density: str | None = None  # of which it is the budget, where it follows from one
    shira_rank: int = 0
    reach: str = ""  # a sentence: what the targets hold of the model, and what none reaches
    #: As `gem_ds.models.blocks.block_sizes`; empty where parameters of blocks are trained.
    blocks: dict[str, int] = field(default_factory=dict)


def settle_targets(args: Arguments, config: PretrainedConfig, mask: Mask | None) -> Targets:
    """What of a model a run changes, found on the meta device, where it costs nothing."""
    try:
        model = model_of(config, trust_remote_code=args.model.trust_remote_code)
    except ValueError as error:
        what = "sequence classification" if is_encoder(config) else "causal language"
        raise ValueError(
            f"{args.model.model_name_or_path} is a {config.model_type} model, which transformers "
            f"does not know as a {what} model: pass one that is."
        ) from error
    targets = _settle(args, model, mask)
    if args.method.method in SPARSE_METHODS:
        targets = replace(targets, blocks=block_sizes(model))
    if not targets.names:
        return targets
    return replace(targets, reach=describe_reach(model, targets.names, head_names(model)))


def _settle(args: Arguments, model: Any, mask: Mask | None) -> Targets:
    num_entries = num_parameters(without_head(model))
    if mask is not None:
        return _targets_of_mask(mask, args, model, num_entries)
    method = args.method.method
    if method in DENSE_METHODS or (method == "ia3" and not args.method.target_modules):
        return Targets(names=[], num_parameters=num_entries)
    targets = _find_targets(model, args.method.target_modules)
    if method in ADAPTER_METHODS:
        targets = _without_experts(targets, args)
    smallest = min(min(model.get_parameter(name).shape) for name in targets)
    if method == "lora" and args.method.lora_r > smallest:
        raise ValueError(
            f"--lora_r {args.method.lora_r} is more than the rank of the smallest target layer, "
            f"{smallest}: lower it."
        )
    found = Targets(names=list(targets), num_parameters=num_entries)
    if method in ("lora", "ia3"):
        return found
    available = sum(model.get_parameter(name).numel() for name in targets)
    takes_all = method == "auto_rgn" or (method == "surgical" and args.method.target_modules)
    if args.method.density is None and takes_all:
        return replace(found, budget=available)
    density = DEFAULT_DENSITY if args.method.density is None else args.method.density
    budget = total_budget(density, num_entries)
    if budget > available:
        raise ValueError(
            f"--density {density} of {num_entries:,} parameters is {budget:,} entries, but "
            f"the {len(targets)} target layers hold {available:,}: lower --density or widen "
            "--target_modules."
        )
    rank = _shira_rank(model, targets, budget) if method == "shira" else 0
    return replace(found, budget=budget, density=density, shira_rank=rank)


def _targets_of_mask(mask: Mask, args: Arguments, model: Any, num_entries: int) -> Targets:
    """The mask decides; a flag that says something else must not be passed over in silence."""
    named, density = args.method.target_modules, args.method.density
    if named and _find_targets(model, named).keys() != mask.indices.keys():
        raise ValueError(
            "The mask is for other layers than --target_modules names: leave the flag out."
        )
    if density is not None and (budget := total_budget(density, num_entries)) != mask.num_selected:
        raise ValueError(
            f"--density {density} is {budget:,} of {num_entries:,} parameters and the mask has "
            f"{mask.num_selected:,}: leave --density out."
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    mask.check_model(shapes, str(args.model.model_name_or_path))
    names = list(targets_of(model, mask.indices))
    return Targets(names=names, num_parameters=num_entries, budget=mask.num_selected)


def _find_targets(model: Any, named: list[str] | None) -> dict[str, nn.Module]:
    """The target layers; a head is none of them."""
    head = head_names(model)
    targets = {name: m for name, m in find_targets(model, named).items() if name not in head}
    if not targets:
        raise ValueError(
            "--target_modules matches layers of the classification head only, which is trained as "
            "a whole: name others."
        )
    return targets


def _without_experts(targets: dict[str, nn.Module], args: Arguments) -> dict[str, nn.Module]:
    """What peft has adapters for; of ``all-linear`` that is linear layers alone."""
    experts = [name for name in targets if not name.endswith(".weight")]
    if experts and args.method.target_modules != [ALL_LINEAR]:
        raise ValueError(
            f"--method {args.method.method} has no adapter for {experts[0]}, a parameter of all "
            "experts: name linear layers with --target_modules."
        )
    return {name: module for name, module in targets.items() if name not in experts}


def _shira_rank(model: Any, targets: Iterable[str], budget: int) -> int:
    """The rank that trains K entries; of a layer peft trains rank x (rows + columns)."""
    sides = sum(sum(model.get_parameter(name).shape) for name in targets)
    rank = max(1, round(budget / sides))
    if abs(rank * sides - budget) > 0.1 * budget:
        raise ValueError(
            f"--method shira trains a multiple of {sides:,} entries here, and --density asks for "
            f"{budget:,}: pass a density of which that is true within a tenth."
        )
    return rank
