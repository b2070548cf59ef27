"""LARS: stochastic gradient descent whose step is scaled layer by layer, for large batches (You et al. 2017)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from rush.errors import ConfigError


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, algorithm 1), in the form of SimCLR (Chen et al. 2020).

    For every tensor w with gradient g::

        u = g + weight_decay w
        r = trust_coefficient |w| / |u|, or 1 where |w| or |u| is 0
        v <- momentum v + lr r u
        w <- w - v

    The norm is that of the sum u, as in all code of self-supervised learning, where the paper writes the sum of the
    norms of its two parts. The learning rate is inside the velocity v, as in both sources, so that a schedule acts on
    new gradients only.

    A parameter group with ``adapt=False`` uses r = 1 and u = g, which is plain momentum without decay, for biases and
    normalization layers. Parameters without a gradient are not changed. The state holds one velocity per parameter.
    Norms stay tensors, so that a step does not wait for the device.

    Raises:
        ConfigError: a number, of the optimizer or of a single group, is outside its range, or a group with
            ``adapt=False`` has a weight decay.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. Options that it does not name are those of the optimizer."""
        if not param_group.get("adapt", True):
            param_group.setdefault("weight_decay", 0.0)
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Call ``closure``, if any, take one step along the current gradients, and return the result of ``closure``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        updates: list[Tensor] = [parameter.grad for parameter in parameters]
        if group["adapt"]:
            if group["weight_decay"]:
                updates = list(torch._foreach_add(updates, parameters, alpha=group["weight_decay"]))
            updates = list(torch._foreach_mul(updates, _ratios(parameters, updates, group["trust_coefficient"])))
        velocities = [self._velocity(parameter) for parameter in parameters]
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, updates, alpha=group["lr"])
        torch._foreach_sub_(parameters, velocities)

    def _velocity(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["velocity"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        velocity: Tensor = state["velocity"]
        return velocity


def _ratios(parameters: list[Tensor], updates: list[Tensor], trust_coefficient: float) -> list[Tensor]:
    """Return the trust ratio r of every parameter, each a 0-d tensor."""
    weights, steps = torch.stack(torch._foreach_norm(parameters)), torch.stack(torch._foreach_norm(updates))
    adapted = trust_coefficient * weights / steps  # not finite where a norm is 0, and not used there
    return list(torch.where((weights > 0) & (steps > 0), adapted, 1.0).unbind())


def _check(options: dict[str, Any]) -> None:
    allowed = {
        "lr": (options["lr"] >= 0, ">= 0"),
        "momentum": (0 <= options["momentum"] < 1, ">= 0 and < 1"),
        "weight_decay": (options["weight_decay"] >= 0, ">= 0"),
        "trust_coefficient": (options["trust_coefficient"] > 0, "> 0"),
    }
    for name, (right, bounds) in allowed.items():
        if not right:
            raise ConfigError(f"{name} of LARS must be {bounds}, got {options[name]}")
    if not options["adapt"] and options["weight_decay"]:
        raise ConfigError(
            f"a parameter group of LARS with adapt=False is not decayed, got weight_decay {options['weight_decay']}; "
            "give 0 or adapt=True"
        )
