"""Exponential moving average of a network's weights, which is evaluated while the network itself is trained."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rush.errors import CheckpointError, ConfigError, ModelError


class WeightAverage:
    """Average of the parameters and floating-point buffers of a module over its training.

    After each step average <- d average + (1 - d) current with d = min(decay, (1 + n) / (10 + n)), where n is the
    number of updates made before. The average thus forgets the initial weights quickly and lengthens during training
    (the ``num_updates`` rule of TensorFlow's ``ExponentialMovingAverage``, Abadi et al. 2016). Running statistics of
    BatchNorm are averaged like weights. Integer buffers are copied. Tensors outside ``module.state_dict()`` are
    ignored. Nothing is drawn and nothing waits for the device.

    Args:
        module: the average starts as a copy of it, on its device and in its types, without gradients.
        decay: in [0, 1). 0 keeps the newest weights.

    Raises:
        ConfigError: ``decay`` is outside its range.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"the decay of the weight average must be >= 0 and < 1, got {decay}")
        self.decay = decay
        self.updates = 0
        self._average = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Add the current weights of ``module`` to the average.

        Raises:
            ModelError: they are those of another network.
        """
        now = module.state_dict()
        if now.keys() != self._average.keys():
            raise ModelError(f"the weight average is of another network: {_difference(self._average, now)}")
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weighed = [name for name, tensor in self._average.items() if tensor.is_floating_point()]
        counted = [name for name, tensor in self._average.items() if not tensor.is_floating_point()]
        if weighed:
            torch._foreach_lerp_([self._average[name] for name in weighed], [now[name] for name in weighed], 1 - decay)
        if counted:
            torch._foreach_copy_([self._average[name] for name in counted], [now[name] for name in counted])
        self.updates += 1

    def copy_into(self, module: nn.Module) -> None:
        """Copy the averaged weights into ``module``.

        Raises:
            ModelError: it is another network.
        """
        try:
            module.load_state_dict(self._average)
        except RuntimeError as error:
            raise ModelError(f"the weight average is of another network: {error}") from error

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates and the averaged tensors themselves, not copies."""
        return {"updates": self.updates, "average": dict(self._average)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load ``state`` in place, on the device of the average.

        Raises:
            CheckpointError: ``state`` is that of another network, or damaged. The average is then as it was.
        """
        try:
            updates, average = int(state["updates"]), dict(state["average"])
            shapes = {name: tensor.shape for name, tensor in average.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the saved weight average is damaged ({type(error).__name__}: {error})") from error
        if shapes != {name: tensor.shape for name, tensor in self._average.items()}:
            raise CheckpointError(
                f"the saved weight average is of another network: {_difference(self._average, average)}; start the "
                "stage again in another --out folder"
            )
        for name, tensor in self._average.items():
            tensor.copy_(average[name])
        self.updates = updates


def _difference(average: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """Return the first names that only one of the two has, or the first tensor of a different shape."""
    missing, extra = sorted(average.keys() - other.keys()), sorted(other.keys() - average.keys())
    if missing or extra:
        return f"missing {missing[:3]}, not expected {extra[:3]}"
    name = next((name for name in average if average[name].shape != other[name].shape), "")
    return f"{name} has shape {tuple(other[name].shape)}, expected {tuple(average[name].shape)}" if name else "none"
