"""``rush finetune``: the classifier of a run on its encoder, or one's own network under noise."""

from __future__ import annotations

from pathlib import Path

from rush.choices import NoiseName
from rush.commands.external import call_module, one_data_set
from rush.commands.run_folders import Overrides, branch_run, data_roots, open_run, print_once
from rush.errors import ConfigError

_READ = ("finetune", "execution", "seed")


def finetune(
    folder: Path | None = None,
    *,
    out: Path | None = None,
    data: list[str] | None = None,
    overrides: Overrides = None,
    model: str | None = None,
    weights: Path | None = None,
    sigma: float | None = None,
    noise: NoiseName = "gaussian",
    root: list[Path] | None = None,
    size: int | None = None,
    recipe: str = "cifar10-small-gaussian",
) -> None:
    """Fine-tune the pre-trained encoder of a run. With --out this happens in a new run, e.g. with fewer labels or
    another objective. Or train one's own network under noise.

    Args:
        folder: Run folder; or give --model, --data and --sigma.
        out: New run folder that begins with the encoder of this one. For --model the folder of the trained network.
        data: For a run: where its data set lies; repeatable. For --model: images, a name or path as in recipes.
        model: module:function that returns a torch.nn.Module from pixels in [0, 1] to logits. Its weights are where
            training begins.
        weights: File of weights from which --model begins: safetensors, or a state_dict of torch.save.
        sigma: Standard deviation of the noise that smooths --model.
        noise: Kind of that noise.
        root: Folder with the archives or shards of the data set of --model; repeatable.
        size: Side in pixels to which the central square of each image of --model is resampled.
        recipe: Recipe whose sections finetune and execution, and seed, train --model; --set changes their fields.
    """
    if folder is not None:
        if model or weights or sigma is not None or root or size:
            raise ConfigError(
                "--model, --weights, --sigma, --root and --size are for a network without a run; omit the folder"
            )
        places = None if data is None else list(map(Path, data))
        target = open_run(folder, places, overrides) if out is None else branch_run(folder, out, places, overrides)
        from rush.pipeline.stages import run_stage

        run_stage(target, "finetune", print_once)
        return
    if model is None or data is None or sigma is None or out is None:
        raise ConfigError("give a run folder, or --model module:function with --data, --sigma and --out")
    for override in overrides or ():
        if override.partition("=")[0].partition(".")[0] not in _READ:
            raise ConfigError(f"--set {override}: --model reads fields of {', '.join(_READ)} alone; see --help")
    name = one_data_set(data)
    from rush.recipe.load import load_recipe

    settings = load_recipe(recipe, overrides or ())
    from rush.data.sources import load_images
    from rush.pipeline.module import train_module
    from rush.smoothing.noise import make_noise

    network = call_module(model)
    images = load_images(name, split="train", root=data_roots(root), size=size)
    train_module(network, model, images, settings, make_noise(noise, sigma), out, weights, print_once)
