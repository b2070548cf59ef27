"""Self-training: a classifier with few labels learns from its own confident answers on all images.

This is FixMatch (Sohn et al. 2020, "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence")
with the answers of a moving average of the classifier (Tarvainen and Valpola 2017, "Mean teachers are better role
models"), balanced over the classes (Berthelot et al. 2020, "ReMixMatch") and sharpened as ``teaching.soft_labels``
does. There is no noise: the result is a teacher, and its student is trained under noise.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rush.data.batches import Batch, Resident
from rush.data.images import ImageSet
from rush.data.views import random_view, unit_float
from rush.models.classifier import Classifier
from rush.recipe.schema import FinetuneConfig, TeachConfig, Views
from rush.runtime.distributed import gather, rank, world_size
from rush.runtime.execution import Execution, compiled
from rush.runtime.sync_norm import desynchronised, synchronised
from rush.training.ema import average_in
from rush.training.loop import TrainingSettings
from rush.training.teaching import soft_labels

MOMENTUM = 0.99
"""Weight of the previous average in every step, of the weights and of the shares of the classes."""
CONFIDENT = 0.8
"""Images whose largest probability is below it teach nothing. Sohn et al. use 0.95 for trainings 100 times as long."""


class MovingTeacher(nn.Module):
    """Moving average of a classifier, which answers for images in evaluation mode, without gradients.

    ``shares`` (K,) is the moving average of its mean probabilities. It is a buffer, like the statistics of BatchNorm,
    which are averaged with the weights, so that ``state_dict`` is all that a resumed run needs.
    """

    shares: Tensor

    def __init__(self, classifier: Classifier, execution: Execution, num_classes: int) -> None:
        super().__init__()
        self.network = copy.deepcopy(classifier).requires_grad_(False).eval()
        desynchronised(self.network)
        self._execution = execution
        self.register_buffer("shares", torch.full((num_classes,), 1 / num_classes))

    def train(self, mode: bool = True) -> "MovingTeacher":  # noqa: ARG002
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return probabilities (B, K) of images (B, C, H, W), and count them in ``shares``, over all processes."""
        probabilities = F.softmax(self._execution.logits(self.network, x), dim=1)
        self.shares.lerp_(gather(probabilities).mean(0), 1 - MOMENTUM)
        return probabilities

    def follow(self, classifier: nn.Module) -> None:
        """Move every weight and statistic towards that of ``classifier``."""
        average_in(self.network.state_dict(), classifier.state_dict(), MOMENTUM)


def self_train(
    images: ImageSet,
    labelled: ImageSet,
    classifier: Classifier,
    teach: TeachConfig,
    config: FinetuneConfig,
    views: Views,
    settings: TrainingSettings,
    name: str,
) -> None:
    """Train ``classifier`` in place by FixMatch for ``teach.epochs`` epochs, and leave its average in evaluation mode.

    In every step the average answers for weak views of a batch of all images. Its answers, where they are confident,
    are the labels of strong views of the same images. Half as many labelled images are drawn beside them, with
    replacement, as weak views.

    Args:
        images: all images, the same in all processes. Their labels, if any, are not read.
        labelled: images with labels.
        classifier: pixels in [0, 1] -> logits, which is right more often than by chance.
        teach: how answers become labels, and the number of epochs.
        config: schedule, batch size and weak views.
        views: strong views.
        settings: conditions of the run.
        name: name of the training, which names its random streams.

    Raises:
        RushError: as ``TrainingRun.run``.

    Cost:
        1.5 forward and backward passes per image and epoch, and one forward pass.
    """
    execution, weak = settings.execution, config.views
    assert labelled.labels is not None
    synchronised(execution.place(classifier)).train()
    teacher = MovingTeacher(classifier, execution, labelled.num_classes)
    execution.place(teacher)
    known, labels = labelled.images.to(execution.device), labelled.labels.to(execution.device)
    drawn = max(1, config.batch_size // (2 * world_size()))
    confident = teach.replace(threshold=max(teach.threshold, CONFIDENT))

    def step(batch: Batch, epoch: float, generator: torch.Generator) -> Tensor:  # noqa: ARG001
        teacher.follow(classifier)
        x = unit_float(batch.images)
        probabilities = teacher(random_view(x, weak, generator))
        targets = soft_labels(probabilities, teacher.shares, confident)
        chosen = torch.randint(len(known), (drawn,), generator=generator, device=known.device)
        few, many = random_view(unit_float(known[chosen]), weak, generator), random_view(x, views, generator)
        logits = execution.logits(classifier, torch.cat([few, many]))
        loss = F.cross_entropy(logits[:drawn], labels[chosen]) + F.cross_entropy(logits[drawn:], targets)
        loss.backward()
        return loss.detach()

    with compiled(classifier.encoder, settings.compile_mode):
        module = nn.ModuleDict({"classifier": classifier, "teacher": teacher})
        source = Resident(images.without_labels(), execution.device, rank(), world_size())
        schedule = config.replace(epochs=teach.epochs, minutes=None, ema_decay=0.0)
        counted = [classifier.encoder, teacher.network.encoder]
        settings.training(module, step, name, source, schedule, counted).run()
    classifier.load_state_dict(teacher.network.state_dict())
    desynchronised(classifier).eval()
