"""Exponential moving average of a network's weights: the average is evaluated, the network itself is trained."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rush.errors import CheckpointError, ConfigError, ModelError


class WeightAverage:
    """Average of the parameters and floating-point buffers of a module over its training.

    After each step average <- d average + (1 - d) now with d = min(decay, (1 + n) / (10 + n)), where n counts the
    updates made before: the average forgets the initial weights at once and lengthens with the training (the
    ``num_updates`` rule of TensorFlow's ``ExponentialMovingAverage``, Abadi et al. 2016). Running statistics of
    BatchNorm are averaged like weights; integer buffers are copied. Only what ``module.state_dict()`` holds counts.

    decay: in [0, 1); 0 keeps the newest weights. The average starts as a copy of ``module``, on its device and in its
    types, without gradients. Nothing is drawn and nothing waits for the device.
    Raises: ConfigError when ``decay`` is outside its range.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"the decay of the weight average must be >= 0 and < 1, got {decay}")
        self.decay = decay
        self.updates = 0
        self._average = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Add the current weights of ``module`` to the average; raise ModelError when they are another network's."""
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
        """Copy the averaged weights into ``module``; raise ModelError when it is another network."""
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

        Raises: CheckpointError, with the average as it was, when ``state`` is another network's or none at all.
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


def _difference(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """Return the first names that only one of the two has, or the first tensor of a different shape."""
    missing, extra = sorted(own.keys() - other.keys()), sorted(other.keys() - own.keys())
    if missing or extra:
        return f"missing {missing[:3]}, not expected {extra[:3]}"
    name = next((name for name in own if own[name].shape != other[name].shape), "")
    return f"{name} has shape {tuple(other[name].shape)}, expected {tuple(own[name].shape)}" if name else "none"
