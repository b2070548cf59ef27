"""Optimizers and learning-rate schedules by name."""

import math
from typing import get_args

import torch
from torch import Tensor, nn

from rush.choices import OptimizerName
from rush.errors import ConfigError
from rush.training.lars import LARS


def build_optimizer(
    module: nn.Module, name: OptimizerName, learning_rate: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return an optimizer over the parameters of ``module`` that require gradients.

    Biases and normalization layers are neither decayed nor adapted by LARS. On CUDA the optimizer is the fused one,
    where torch has it.

    Raises:
        ConfigError: the name is unknown.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay, "adapt": True},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]
    if name == "lars":
        return LARS(groups, lr=learning_rate, momentum=momentum)
    groups = [{key: value for key, value in group.items() if key != "adapt"} for group in groups]
    fused = any(parameter.is_cuda for parameter in trainable)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=momentum > 0, fused=fused)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(momentum, 0.999), fused=fused)
    raise ConfigError(f"unknown optimizer {name!r}; allowed: {', '.join(get_args(OptimizerName))}")


def representable(rate: float, device: str) -> float:
    """Return the learning rate as it is used: rounded to float32 on CUDA, as a captured step reads it."""
    return float(torch.tensor(rate, dtype=torch.float32)) if torch.device(device).type == "cuda" else rate


def rate_tensor(optimizer: torch.optim.Optimizer, device: str) -> Tensor:
    """Return a tensor on ``device`` that is the learning rate of all groups of ``optimizer`` from now on.

    Raises:
        ConfigError: the optimizer reads its learning rate on the host.
    """
    if isinstance(optimizer, LARS):
        raise ConfigError(
            "a step with the optimizer lars cannot be captured as a CUDA graph; use sgd or adamw, or set "
            'execution.compile_training = "none"'
        )
    dtype = torch.float32 if torch.device(device).type == "cuda" else torch.float64
    rate = torch.full((), float(optimizer.param_groups[0]["lr"]), dtype=dtype, device=device)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def set_capturable(optimizer: torch.optim.Optimizer, capturing: bool) -> None:
    """Set the capturable flag of ``optimizer``, if it has one. An optimizer without it does not need it."""
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = capturing


def cosine_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """Return the factor on the peak learning rate at ``step`` (0-based).

    Linear warm-up, then half a cosine down to zero at ``total_steps``.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
