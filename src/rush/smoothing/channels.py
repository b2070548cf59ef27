"""Detection of networks that repeat the plane of grey images before their first layer.

A colour network whose normalization is ``(x - mean) / std`` accepts grey images: they are broadcast to three planes.
Under smoothing the three planes carry the same noise, with which the network was not trained. The certified classifier
would then not be the one that the user means.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rush.runtime.execution import Execution

_LAYERS = (_ConvNd, nn.Linear)
_EQUAL = 1e-4  # 1 - correlation that rounding leaves between planes that are shifted and scaled copies


class _Reached(Exception):
    """The first layer with weights has been reached, with this ``input``."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.input = value


def copied_planes(module: nn.Module, execution: Execution, shape: tuple[int, ...], generator: torch.Generator) -> int:
    """Return the number of copies of a grey image's plane that reach the first convolution or linear layer.

    It is 1 for images with several channels, for networks without such layers, and if the planes are not shifted and
    scaled copies of one another.

    Args:
        module: the network. Its call ends at that layer.
        execution: how it runs.
        shape: (C, H, W) of the images.
        generator: source of the two random images that the network is called on.
    """
    channels, height, width = shape
    if channels != 1 or height * width < 2 or not any(isinstance(layer, _LAYERS) for layer in module.modules()):
        return 1
    x = torch.rand((2, *shape), generator=generator, device=generator.device)
    first_input = _first_input(module, execution, x)
    if first_input is None or first_input.ndim < 2 or len(first_input) != len(x):
        return 1
    rows = first_input.double().flatten(1).cpu()
    copies, rest = divmod(rows.shape[1], height * width)
    if copies < 2 or rest:
        return 1
    planes = rows.view(2, copies, height * width)
    centred = planes - planes.mean(2, keepdim=True)
    size = centred.norm(dim=2, keepdim=True)
    if not bool((size > 0).all()):
        return 1
    unit = centred / size
    alike = (unit * unit[:, :1]).sum(2).abs()
    return copies if bool((alike > 1 - _EQUAL).all()) else 1


def _first_input(module: nn.Module, execution: Execution, x: Tensor) -> Tensor | None:
    """Return the input of the first layer with weights when ``module`` is called on ``x``, None if none is reached."""

    def stop(_: nn.Module, inputs: tuple[object, ...]) -> None:
        raise _Reached(inputs[0] if inputs else None)

    hooks = [layer.register_forward_pre_hook(stop) for layer in module.modules() if isinstance(layer, _LAYERS)]
    try:
        with torch.no_grad(), execution.autocast():
            module(execution.copied(x))
    except _Reached as reached:
        return reached.input.detach() if isinstance(reached.input, Tensor) else None
    except Exception:  # the first real call reports it
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return None
