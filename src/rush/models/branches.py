"""A second set of normalization layers for a network that is otherwise shared."""

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from rush.errors import ModelError


class NormBranch(nn.Module):
    """Parameters and buffers of all BatchNorm layers of a module a second time (dual BatchNorm).

    Clean and adversarial images follow different statistics; Jiang et al. 2020, "Robust Pre-Training by Adversarial
    Contrastive Learning" (algorithm 1), give each stream its own normalization and share everything else. The branch
    starts with the module's values. It does not hold the module: the two are trained, moved and saved side by side.

    Subclasses of BatchNorm are taken along as they are, provided that they update their buffers in place, as torch's
    own do; a buffer that a layer replaces by another tensor in its forward is lost.

    Raises: ModelError when the module has no BatchNorm layer.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        found = _norms(module)
        if not found:
            raise ModelError(
                f"{type(module).__name__} has no BatchNorm layer to branch; train it without a second normalization"
            )
        self.names = tuple(found)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in found.values())

    def call(self, module: nn.Module, x: Tensor) -> Tensor:
        """``module(x)`` with the normalization of this branch.

        Whether by batch or running statistics is decided by ``module.training`` (of each of its layers), not by the
        mode of the branch; so are momentum and eps. In training mode the branch's running statistics are updated and
        those of the module stay. Gradients flow into the branch's parameters and the module's others.
        """
        return functional_call(module, self._values(), (x,))

    @torch.no_grad()
    def copy_into(self, module: nn.Module) -> None:
        """Overwrite the normalization of ``module`` by that of this branch.

        Raises: ModelError when its BatchNorm layers have other names than those that were branched.
        """
        found = _norms(module)
        if tuple(found) != self.names:
            raise ModelError(
                f"the branch holds the BatchNorm layers {', '.join(self.names)}, "
                f"the module has {', '.join(found) or 'none'}; give the module that was branched, or a copy of it"
            )
        for layer, own in zip(found.values(), self.layers, strict=True):
            layer.load_state_dict(own.state_dict())

    def _values(self) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, layer in zip(self.names, self.layers, strict=True):
            prefix = f"{name}." if name else ""
            values |= {prefix + key: value for key, value in (*layer.named_parameters(), *layer.named_buffers())}
        return values


def _norms(module: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}
