"""Smoothed classifiers in the form of the Hugging Face hub: weights, configuration and a model card."""

import shutil
import tempfile
from pathlib import Path

from rush.errors import RunError
from rush.models.classifier import Classifier
from rush.models.storage import save
from rush.records.read_run import RunResults, read_run
from rush.reporting.wording import summary_rows
from rush.runtime.extras import optional
from rush.runtime.files import write_text
from rush.smoothing.classifier import SmoothedClassifier

_HEAD = """---
library_name: rush-smoothing
pipeline_tag: image-classification
tags:
- randomized-smoothing
- certified-robustness
- adversarial-robustness
---

# {name}

{what}

## Use

```python
import rush

model = rush.load("hf://OWNER/{name}")
images = rush.load_images({data!r}, split="test")
model.predict(images[:8])  # a class per image, or -1 where the votes do not decide
rush.certify(model, images[:100], "sequential")
```

Pixels are in [0, 1]. Normalization is a layer of the network.
"""
_LIMITS = """
## Limits

- A certificate is about the smoothed classifier, in the norm and up to the radius that it states, with the stated
  probability of error. It says nothing about other changes of an image, such as rotations or blur.
- Figures hold for images like the test images. An attack is evidence, not proof: a stronger one may come.
- The certified classifier is the one in this precision and batch size. Quantize or convert it, and certify again.
"""


def save_pretrained(model: SmoothedClassifier | Classifier, folder: Path, run: Path | None = None) -> None:
    """Write a classifier as a hub expects it: ``config.json``, ``model.safetensors`` and ``README.md``, the model card.

    Args:
        model: as in ``rush.save``.
        folder: a new or empty folder.
        run: the run folder whose figures the card gives: certified, attacked and audited accuracy.

    Raises:
        InputError, RunError, WriteError: as ``rush.save``, or ``run`` is not a run folder.
    """
    results = None if run is None else read_run(run)
    save(model, folder)
    (folder / "model.json").rename(folder / "config.json")
    write_text(folder / "README.md", model_card(model, results))


def push_to_hub(
    model: SmoothedClassifier | Classifier, repository: str, run: Path | None = None, private: bool = False
) -> str:
    """Upload a classifier with its model card to the Hugging Face hub, as the user that is logged in.

    Args:
        model: as in ``rush.save``.
        repository: "owner/name", created if it does not exist.
        run: as in ``save_pretrained``.
        private: whether a new repository is private.

    Returns:
        The address of the commit.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        RunError: the hub refuses.
    """
    hub = optional("huggingface_hub", "push_to_hub")
    folder = Path(tempfile.mkdtemp())
    try:
        save_pretrained(model, folder, run)
        api = hub.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=str(folder)))
    except OSError as error:  # errors of the hub are among them
        raise RunError(f"{repository} was not uploaded: {error}; log in with `hf auth login`, and try again") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def model_card(model: SmoothedClassifier | Classifier, results: RunResults | None) -> str:
    """Return the model card in Markdown: what the model is, the figures of its run if any, its use and its limits."""
    noise = "not smoothed"
    if isinstance(model, SmoothedClassifier):
        noise = f"smoothed by {model.noise.name} noise of sigma {model.sigma:g}"
    shape, classes = model.kind.shape, model.kind.classes or ()
    images = f"images of {'x'.join(map(str, shape))} values" if shape else "images"
    what = f"A classifier of {images} in {len(classes) or 'unnamed'} classes, {noise}."
    name = results.name if results is not None else "smoothed-classifier"
    data = results.setting("data", "name") if results is not None else "cifar10"
    text = _HEAD.format(name=name, what=what, data=data)
    if results is not None:
        rows = "\n".join(f"| {key} | {value.replace('|', '/')} |" for key, value in summary_rows(results))
        text += f"\n## Figures\n\n| figure | value |\n| --- | --- |\n{rows}\n"
    return text + _LIMITS
