"""Exponential moving average of a network's weights, which is evaluated while the network itself is trained."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rush.errors import ConfigError


@torch.no_grad()
def average_in(average: Mapping[str, Tensor], current: Mapping[str, Tensor], decay: float) -> None:
    """Replace the tensors of ``average`` in place by decay x average + (1 - decay) x current, and copy integers.

    Args:
        average: state of a module, with the names of ``current``.
        current: state of a module with the same tensors.
        decay: weight of the average so far.
    """
    weighed = [name for name, tensor in average.items() if tensor.is_floating_point()]
    counted = [name for name, tensor in average.items() if not tensor.is_floating_point()]
    if weighed:
        torch._foreach_lerp_([average[name] for name in weighed], [current[name] for name in weighed], 1 - decay)
    if counted:
        torch._foreach_copy_([average[name] for name in counted], [current[name] for name in counted])


class WeightAverage:
    """Average of the parameters and floating-point buffers of a module over its training.

    After each step average <- d average + (1 - d) current with d = min(decay, (1 + n) / (10 + n)), where n is the
    number of updates made before. The average thus forgets the initial weights quickly and lengthens during training
    (the ``num_updates`` rule of TensorFlow's ``ExponentialMovingAverage``, Abadi et al. 2016). Running statistics of
    BatchNorm are averaged like weights. Integer buffers are copied. Tensors outside ``module.state_dict()`` are
    ignored. Nothing is drawn and nothing waits for the device.

    Args:
        module: the average starts as a copy of it, on its device and in its types, without gradients.
        decay: decay of the average, in [0, 1). 0 keeps the newest weights.

    Raises:
        ConfigError: ``decay`` is outside its range.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"the decay of the weight average must be >= 0 and < 1, got {decay}")
        self.decay = decay
        self.updates = 0
        self._average = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    def update(self, module: nn.Module) -> None:
        """Add the current weights of ``module`` to the average."""
        average_in(self._average, module.state_dict(), min(self.decay, (1 + self.updates) / (10 + self.updates)))
        self.updates += 1

    def copy_into(self, module: nn.Module) -> None:
        """Copy the averaged weights into ``module``."""
        module.load_state_dict(self._average)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates and the averaged tensors themselves, not copies."""
        return {"updates": self.updates, "average": dict(self._average)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of an average of the same network in place, on the device of this average."""
        for name, tensor in self._average.items():
            tensor.copy_(state["average"][name])
        self.updates = int(state["updates"])
