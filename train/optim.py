"""Optimizers and learning rate schedules, by name."""

import importlib.util
import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from train.sections import Optimizer as OptimizerConfig
from train.sections import Schedule as ScheduleConfig
from train.wording import ConfigError


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """An optimizer of all parameters. Raises ConfigError where apex is asked for and cannot be had."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    devices = {parameter.device.type for parameter in parameters}
    if config.name in ("apex_adam", "apex_sgd"):
        fused = _apex("FusedAdam" if config.name == "apex_adam" else "FusedSGD", config.name, devices)
        if config.name == "apex_adam":
            return fused(parameters, **common, betas=config.betas, adam_w_mode=False)
        return fused(parameters, **common, momentum=config.momentum)
    common["fused"] = devices <= {"cpu", "cuda"} or None
    if config.name == "sgd":
        return torch.optim.SGD(parameters, **common, momentum=config.momentum)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name](parameters, **common, betas=config.betas)


def _apex(wanted: str, name: str, devices: set[str]) -> Any:
    """NVIDIA apex's optimizer class. PyPI's `apex` is an unrelated web toolkit with the same import name."""
    if importlib.util.find_spec("apex") is None:
        raise ConfigError(
            f"optimizer.name = {name}: NVIDIA apex is not installed. Build it from its source (PyPI's apex is another "
            f"project), or use optimizer.name={name.removeprefix('apex_')}, which torch fuses as well."
        )
    try:
        import apex.optimizers  # type: ignore[import-not-found]

        optimizer = getattr(apex.optimizers, wanted)
    except (ImportError, AttributeError):
        raise ConfigError(
            f"optimizer.name = {name}: the apex that is installed has no apex.optimizers.{wanted}; it is PyPI's web "
            "toolkit, or NVIDIA apex built without its extensions. Uninstall it and build NVIDIA's from its source, or "
            f"use optimizer.name={name.removeprefix('apex_')}."
        ) from None
    if devices != {"cuda"}:
        torchs = name.removeprefix("apex_")
        raise ConfigError(f"optimizer.name = {name}: apex's fused optimizers need a GPU; use optimizer.name={torchs}.")
    return optimizer


def build_schedule(config: ScheduleConfig, optimizer: Optimizer, *, epochs: int, steps_per_epoch: int) -> LRScheduler:
    """A schedule that is stepped once an optimizer step."""
    total = epochs * steps_per_epoch
    if config.name == "onecycle":
        rise = 0.3 if config.warmup is None else config.warmup
        peaks = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, max_lr=peaks, total_steps=total, pct_start=rise)
    return LambdaLR(optimizer, lambda step: factor(config, step, total, steps_per_epoch))


def factor(config: ScheduleConfig, step: int, total: int, steps_per_epoch: int) -> float:
    """Learning rate at a step as a fraction of the highest: a linear rise, then what the schedule's name says."""
    rise = round((config.warmup or 0.0) * total)
    if step < rise:
        return (step + 1) / rise
    if config.name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(total - rise, 1)))
    if config.name == "step":
        return config.gamma ** sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
    return 1.0
