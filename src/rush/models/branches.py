"""A second set of normalization layers for a network that is otherwise shared."""

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from rush.errors import ModelError


class NormBranch(nn.Module):
    """A second copy of the parameters and buffers of all BatchNorm layers of a module (dual BatchNorm).

    Clean and adversarial images follow different statistics. Jiang et al. 2020, "Robust Pre-Training by Adversarial
    Contrastive Learning" (algorithm 1), give each stream its own normalization and share everything else. The branch
    starts with the module's values. It does not hold the module: the two are trained, moved and saved separately.

    Subclasses of BatchNorm are supported if they update their buffers in place, as torch's own do. A buffer that a
    layer replaces by another tensor in its forward is lost.

    Args:
        module: the module to branch.

    Raises:
        ModelError: The module has no BatchNorm layer.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        norms = _norms(module)
        if not norms:
            raise ModelError(
                f"{type(module).__name__} has no BatchNorm layer to branch; train it without a second normalization"
            )
        self.names = tuple(norms)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in norms.values())

    def call(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return ``module(x)`` with the normalization of this branch.

        The layers of ``module`` decide by their ``training`` flag whether batch or running statistics are used, and
        they provide momentum and eps. The mode of the branch has no effect. In training mode the branch's running
        statistics are updated and those of the module do not change. Gradients flow into the branch's parameters and
        the module's other parameters.
        """
        return functional_call(module, self._values(), (x,))

    @torch.no_grad()
    def copy_into(self, module: nn.Module) -> None:
        """Overwrite the normalization of ``module`` by that of this branch.

        Raises:
            ModelError: The names of its BatchNorm layers differ from those of the branched module.
        """
        norms = _norms(module)
        if tuple(norms) != self.names:
            raise ModelError(
                f"the branch holds the BatchNorm layers {', '.join(self.names)}, "
                f"the module has {', '.join(norms) or 'none'}; give the module that was branched, or a copy of it"
            )
        for layer, branched in zip(norms.values(), self.layers, strict=True):
            layer.load_state_dict(branched.state_dict())

    def _values(self) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, layer in zip(self.names, self.layers, strict=True):
            prefix = f"{name}." if name else ""
            values |= {prefix + key: value for key, value in (*layer.named_parameters(), *layer.named_buffers())}
        return values


def _norms(module: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}
