"""Does a network show one plane of grey images several times to its first layer? Asked by a call on two images.

A colour network whose normalization is written as ``(x - mean) / std`` takes grey images without an error: they are
broadcast to three planes. Under smoothing the three then carry the same noise, which is no noise that the network was
trained with, and the classifier that is certified is another one than the user means.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rush.runtime.execution import Execution

_LAYERS = (_ConvNd, nn.Linear)
_EQUAL = 1e-4  # of the spread of a plane: what rounding leaves between planes that are shifted and scaled copies


class _Reached(Exception):
    """The first layer with weights has been reached; ``seen`` is its input."""

    def __init__(self, seen: object) -> None:
        super().__init__()
        self.seen = seen


def copied_planes(module: nn.Module, execution: Execution, shape: tuple[int, ...], generator: torch.Generator) -> int:
    """Return how often the first convolution or linear layer of ``module`` sees the one plane of images of ``shape``.

    1 for images of several channels, for networks without such layers and where the planes are no shifted and scaled
    copies of one another. The call ends at that layer.

    Random: two images of noise from ``generator``.
    """
    channels, height, width = shape
    if channels != 1 or height * width < 2 or not any(isinstance(layer, _LAYERS) for layer in module.modules()):
        return 1
    x = torch.rand((2, *shape), generator=generator, device=generator.device)
    seen = _first_input(module, execution, x)
    if seen is None or seen.ndim < 2 or len(seen) != len(x):
        return 1
    rows = seen.double().flatten(1).cpu()
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
    """What the first layer with weights is given when ``module`` is called on ``x``; None where none is reached."""

    def stop(_: nn.Module, inputs: tuple[object, ...]) -> None:
        raise _Reached(inputs[0] if inputs else None)

    hooks = [layer.register_forward_pre_hook(stop) for layer in module.modules() if isinstance(layer, _LAYERS)]
    try:
        with torch.no_grad(), execution.autocast():
            module(execution.copied(x))
    except _Reached as reached:
        return reached.seen.detach() if isinstance(reached.seen, Tensor) else None
    except Exception:  # what the network cannot take is said by the first real call
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return None
