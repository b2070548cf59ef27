"""Weights of other libraries: read without running code, and mapped to the names of an encoder or a network."""

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rush.errors import RunError
from rush.models.resnet import ResNet

_NESTED = ("state_dict", "model_state_dict", "model", "network", "net")
"""Names under which checkpoints hold the weights beside other things."""
_COUNTERS = "num_batches_tracked"  # of BatchNorm, which this library never reads
Names = Callable[[str], str | None]
"""Maps the name of a tensor in the file to its name in the network, or to None if it has none there."""


@dataclass(frozen=True)
class Imported:
    """The outcome of loading a file of weights.

    Attributes:
        loaded: number of tensors.
        left: names in the file that were not loaded.
    """

    loaded: int
    left: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """Sentences on what was loaded and what was not."""
        return [f"{self.loaded} tensors loaded", *([f"not loaded: {', '.join(self.left)}"] if self.left else [])]


def load_imported(network: nn.Module, file: Path) -> Imported:
    """Load ``network`` in place from a file of weights, under the names that fit best.

    Prefixes such as "module.", "backbone." or "encoder_q." are dropped. For a ResNet of this library, the names of
    torchvision, which MoCo and solo-learn use, are known, and so are those that lightly gives to a sequence of its
    layers.

    Args:
        network: an encoder or a network.
        file: safetensors, or what ``torch.save`` wrote. From the latter only tensors and plain containers are read.

    Raises:
        RunError: the file is missing, damaged or holds something else, or a weight of ``network`` is not in it.
    """
    state = _read(file)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    renamings = [lambda name: name, *(_resnet_names(network) if isinstance(network, ResNet) else ())]
    best: dict[str, str] = {}
    for prefix in {"", *(name[: match.end()] for name in state for match in re.finditer(r"\.", name))}:
        for rename in renamings:
            found = _matched(state, expected, prefix, rename)
            if len(found) > len(best):
                best = found
    missing = [name for name in expected if name not in best and not name.endswith(_COUNTERS)]
    if missing:
        raise RunError(
            f"{file} does not fit the network: {len(missing)} of {len(expected)} of its tensors are not in it, first "
            f"{missing[0]} of shape {expected[missing[0]]}; the file has {', '.join(list(state)[:3])}, ... Give the "
            "architecture that the weights are of (model.encoder, model.width and model.stem of the recipe)"
        )
    network.load_state_dict({**network.state_dict(), **{name: state[source] for name, source in best.items()}})
    used = set(best.values())
    return Imported(len(best), tuple(name for name in state if name not in used and not name.endswith(_COUNTERS)))


def _read(file: Path) -> dict[str, Tensor]:
    """Return the tensors in a file by their names."""
    remedy = "give a file of weights: safetensors, or a state_dict that torch.save wrote"
    if not file.is_file():
        raise RunError(f"{file} is missing or not a file; {remedy}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers may raise anything on a damaged file
        raise RunError(f"{file} cannot be read as weights ({type(error).__name__}); {remedy}") from error
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        nested = next((content[name] for name in _NESTED if name in content), None)
        if nested is None:
            break
        content = nested
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not state:
        raise RunError(f"{file} holds no tensors by name; {remedy}")
    return state


def _matched(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], prefix: str, rename: Names
) -> dict[str, str]:
    """Return for each expected name that is found with its shape below ``prefix`` the name in the file."""
    found = {}
    for source, tensor in state.items():
        name = rename(source.removeprefix(prefix)) if source.startswith(prefix) else None
        if name is not None and expected.get(name) == tuple(tensor.shape):
            found[name] = source
    return found


def _resnet_names(network: ResNet) -> tuple[Names, ...]:
    """Return the renamings from torchvision's names, and from the numbers that lightly's sequences give its layers.

    Before the stages a sequence has convolution and normalization, then activation and pooling or none of them.
    """
    starts = (0, *itertools.accumulate(network.blocks))  # of the stages in the sequence of blocks

    def torchvision(name: str) -> str | None:
        name = re.sub(r"^conv1\.", "stem.0.", re.sub(r"^bn1\.", "stem.1.", name))
        match = re.match(r"layer(\d)\.(\d+)\.(.*)", name)
        if match is None:
            return name
        stage, block, rest = int(match[1]) - 1, int(match[2]), match[3]
        if stage >= len(network.blocks):
            return None
        rest = re.sub(r"^bn(\d)", r"norm\1", rest.replace("downsample.", "shortcut."))
        return f"stages.{starts[stage] + block}.{rest}"

    def numbered(first: int) -> Names:
        """Return the renaming of a sequence whose part ``first`` is the first stage."""

        def rename(name: str) -> str | None:
            match = re.match(r"(\d+)\.(.*)", name)
            if match is None:
                return None
            number, rest = int(match[1]), match[2]
            part = {0: "conv1", 1: "bn1"}.get(number, f"layer{number - first + 1}")
            return torchvision(f"{part}.{rest}")

        return rename

    return torchvision, numbered(4), numbered(3), numbered(2)
