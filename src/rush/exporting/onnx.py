"""The base classifier as an ONNX file, which other runtimes evaluate under noise of their own."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from rush.data.checks import kind_of
from rush.errors import InputError, MissingExtraError, ModelError
from rush.runtime.execution import device_of
from rush.runtime.extras import optional
from rush.runtime.files import write_atomically
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.quantized import is_quantized

INPUT, OUTPUT = "pixels", "logits"
_TOLERANCE = 1e-4  # tolerance of the logits, relative to the largest


def export_onnx(model: SmoothedClassifier | nn.Module, file: Path, image_shape: Sequence[int] | None = None) -> None:
    """Write the base classifier in float32, from ``pixels`` (B, C, H, W) to ``logits`` (B, K) for any B.

    The noise is not part of the file: it is added to the pixels beforehand. The metadata of the file hold the key
    ``rush``, a JSON object with noise, sigma, class names and image shape. Where onnxruntime is installed, its logits
    are compared with torch's.

    A classifier that was certified in bfloat16 is a different classifier in float32: certify it again.

    Args:
        model: the smoothed classifier, or a network that is not smoothed.
        file: a new file.
        image_shape: (C, H, W), needed where the model does not know it.

    Raises:
        InputError: the shape is not known.
        ModelError: the network cannot be exported, or onnxruntime computes something else.
        MissingExtraError: onnx or onnxscript is not installed.
    """
    noise: dict[str, object] = {"noise": None, "sigma": None, "classes": None}
    if isinstance(model, SmoothedClassifier):
        noise = {"noise": model.noise.name, "sigma": model.sigma, "classes": list(model.classes)}
    network = model.classifier if isinstance(model, SmoothedClassifier) else model
    if is_quantized(network):
        raise ModelError("a network in 8-bit integers cannot be exported to ONNX; export one in float32 and certify it")
    shape = image_shape or kind_of(model).shape
    if shape is None:
        raise InputError("the shape of the images is not known; give image_shape=(C, H, W)")
    onnx = optional("onnx", "export to ONNX")
    optional("onnxscript", "export to ONNX")
    device, dtypes = device_of(network), {name: tensor.dtype for name, tensor in network.state_dict().items()}
    if any(dtype in (torch.float16, torch.bfloat16) for dtype in dtypes.values()):
        raise ModelError("the weights are in half precision; convert a copy with .float() and export that")
    example = torch.rand(2, *shape, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about versions of its own parts
        try:
            program = torch.onnx.export(
                network.eval(),
                (example,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # the exporter may raise anything
            raise ModelError(f"the network cannot be exported to ONNX: {str(error).split(chr(10))[0]}") from error
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {"rush": json.dumps({**noise, "image_shape": list(shape)})})
    content = proto.SerializeToString()
    _compare(content, network, example)
    write_atomically(file, lambda target: target.write_bytes(content))


def _compare(content: bytes, network: nn.Module, example: torch.Tensor) -> None:
    """Raise ModelError where onnxruntime is installed and its logits differ from torch's by more than rounding."""
    try:
        onnxruntime = optional("onnxruntime", "comparison")
    except MissingExtraError:
        return
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for images in (example, example[:1]):
        found = torch.from_numpy(session.run([OUTPUT], {INPUT: images.cpu().numpy()})[0])
        with torch.no_grad():
            expected = network(images).float().cpu()
        error = float((found - expected).abs().max())
        if not error <= _TOLERANCE * max(1.0, float(expected.abs().max())):
            raise ModelError(f"logits of onnxruntime differ from torch's by {error:.3g}; nothing was written")
