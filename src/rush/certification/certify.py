"""Certification of a data set by continuous batching: images enter and leave the running batch as they are decided.

Every image has its own noise (``stream(seed, "certify-selection", id)`` and ``"certify-estimation"``), drawn in blocks
of 100. The rule is applied after every block of an image's path, and votes drawn beyond the block that decides are
discarded unread. A certificate therefore depends on the image, the seed and the rule alone. The number of images in
flight, their order, the other rows of a tile and the number of processes do not change a bit of it.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rush.certification.apply_rule import Decider, rivals_of
from rush.certification.bounds import Certified
from rush.certification.certificates import Certificates, join_certificates
from rush.certification.exact import certify_all
from rush.certification.rule import Rule, make_rule
from rush.choices import BLOCK, CertifyBound, CertifyMethod, Level, Stopping
from rush.data.checks import Images, LabelledPixels, labelled_pixels, pixel_ids
from rush.recipe.schema import CertifyConfig
from rush.runtime.distributed import gather_objects, rank, world_size
from rush.runtime.numbers import positive_integer
from rush.runtime.progress import asked, showing
from rush.runtime.progress import progress as shown_progress
from rush.runtime.transfer import sent
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.votes import PendingVotes, VoteRequest

_DEFAULTS = CertifyConfig()
_ROUND_TILES = 25  # tiles launched together before anything is read back


def certify(
    smoothed: SmoothedClassifier,
    images: Images,
    method: CertifyMethod | None = None,
    num_selection: int = _DEFAULTS.num_selection,
    num_estimation: int = _DEFAULTS.num_estimation,
    alpha: float = _DEFAULTS.alpha,
    radii: Sequence[float] | None = _DEFAULTS.radii,
    level: Level = _DEFAULTS.level,
    futility: float = _DEFAULTS.futility,
    seed: int = 0,
    in_flight: int | None = None,
    bound: CertifyBound | None = _DEFAULTS.bound,
    stopping: Stopping = _DEFAULTS.stopping,
    progress: bool | None = None,
) -> Certificates:
    """Certify images: a class and a radius within which the smoothed classifier provably predicts it.

    The radius is in l2 under Gaussian and discrete noise, and in l1 under uniform, Laplace and splitting noise.

    With torch.distributed initialised the images are shared among the processes, and each returns all certificates.

    Args:
        smoothed: the classifier.
        images: an ImageSet with labels, or a pair (float images (N, C, H, W) in [0, 1], labels (N,)).
        method: ``clopper-pearson`` draws ``num_estimation`` samples per image (Cohen et al. 2019, algorithm CERTIFY).
            ``sequential`` draws until the radii are decided, at most ``num_estimation`` (``certification.sequential``).
            ``exact`` is for splitting noise: all draws vote, and no argument below matters. None means ``exact`` for
            splitting noise, and ``clopper-pearson`` for any other noise.
        num_selection: samples per image that select the class. They are used for nothing else.
        num_estimation: samples per image that bound its probability.
        alpha: probability of a false certificate.
        radii: grid of radii in pixel units, rounded up to six decimals. None means any radius for ``clopper-pearson``,
            and 0 and the multiples of sigma / 2 within reach for ``sequential``. Few radii need few samples.
        level: with ``image``, each certificate is false with probability at most alpha. With ``family``, all of them
            hold together with probability at least 1 - alpha (alpha / N each).
        futility: ``sequential`` gives up a radius, and stops, once the probability to certify it by the cap,
            estimated from the votes so far, is below this. Giving up is never unsound.
        seed: seed of the noise.
        in_flight: number of images sampled at once. It changes no result.
        bound: None for the first bound of the method. For the method ``clopper-pearson``, the bound ``clopper-pearson``
            bounds all other classes by 1 - p_lower. ``two-classes`` also bounds the class with the next most votes
            (``certification.bounds``), which pays off where there are many classes. It must be chosen before the votes
            are seen. For ``sequential``, it is ``geometric`` or ``beta`` for the selected class alone, or
            ``two-classes``.
        stopping: "power" gives up as described under ``futility``. With "test", ``sequential`` continues until it has
            shown, at the level ``futility``, that the radius cannot be certified, which takes 1.4 to 2 times as many
            votes.
        progress: True shows a bar on a terminal, otherwise a line every ten seconds on standard error. False shows
            nothing. None shows the bar alone.

    Returns:
        Certificates of all images, in their order.

    Raises:
        InputError: bad images, labels or numbers, or a radius beyond what ``num_estimation`` samples can certify.
        ModelError: the classifier cannot be certified: it is in training mode, stochastic, lets an image depend on the
            rest of the batch, or changed before the end.

    Cost: at most ``num_selection + num_estimation`` forward passes per image, in full tiles.

    Random: one pair of streams per image, named by ``seed`` and the image's id.

    Example:
        >>> import rush, torch
        >>> classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
        >>> smoothed = rush.SmoothedClassifier(classifier, sigma=0.25, num_classes=10)
        >>> images = rush.load_images("digits", split="test")[:5]
        >>> certificates = rush.certify(smoothed, images, num_estimation=1000)
        >>> certificates.radius.shape
        (5,)
        >>> 0 <= certificates.accuracy(radius=0.25) <= 1
        True
    """
    pixels = labelled_pixels(images, smoothed.num_classes, smoothed.kind)
    smoothed.check_shape(pixels.x.shape[1:])
    smoothed.noise.check(pixels.x)
    rule = make_rule(
        noise=smoothed.noise.name,
        bound=bound,
        sigma=smoothed.sigma,
        method=method,
        alpha=alpha,
        level=level,
        num_images=len(pixels),
        num_selection=num_selection,
        num_estimation=num_estimation,
        radii=radii,
        futility=futility,
        stopping=stopping,
    )
    positions = list(range(rank(), len(pixels), world_size()))
    with showing(asked(progress)):
        certified = dict(certify_each(smoothed, pixels, rule, seed, positions, in_flight))
    smoothed.answered(pixels.x.shape[1:])
    parts = {position: part for shard in gather_objects(certified) for position, part in shard.items()}
    return join_certificates([parts[position] for position in range(len(pixels))])


def certify_each(
    smoothed: SmoothedClassifier,
    pixels: LabelledPixels,
    rule: Rule,
    seed: int,
    positions: Sequence[int],
    in_flight: int | None = None,
) -> Iterator[tuple[int, Certificates]]:
    """Yield (position, certificate) for the images at ``positions``, each as soon as it is decided.

    This is ``certify`` without the checks of its arguments. Two cohorts of images take turns: while the device counts
    the votes of one, the rule is applied to those of the other.

    Raises:
        ModelError: as ``certify``. If the iteration ends with one, no certificate that it yielded is valid.
    """
    if in_flight is not None:
        in_flight = positive_integer("in_flight", in_flight)
    running = _Running(rule)
    if rule.exact:
        with shown_progress("certify", len(positions)) as advance:
            for position, certificate in certify_all(smoothed, pixels, rule, positions):
                yield position, certificate
                advance(1, running.after(certificate))
        smoothed.recheck()
        return
    capacity = max(1, _ROUND_TILES * smoothed.execution.rows(pixels.x.shape[1:]) // BLOCK)
    decider = Decider(rule)
    engine = _Engine(smoothed, decider, capacity)
    sizes = _cohort_sizes(rule, capacity, in_flight)
    waiting = iter(positions)
    cohorts: list[list[_InProgress]] = [[] for _ in sizes]
    launched: _Round | None = None
    with shown_progress("certify", len(positions)) as advance:
        for turn in itertools.cycle(range(len(sizes))):
            entering = itertools.islice(waiting, sizes[turn] - len(cohorts[turn]))
            cohorts[turn] += [engine.enter(pixels, position, seed) for position in entering]
            # Queue this cohort's round before the other's votes are read, so that the device never waits for the host.
            following = engine.launch(cohorts[turn]) if cohorts[turn] else None
            for image in engine.collect(launched) if launched else ():
                certified, outcome = decider.conclude(*image.state)
                certificate = engine.certificate(image, certified, outcome)
                yield image.position, certificate
                advance(1, running.after(certificate))
            cohorts = [[image for image in cohort if not image.done] for cohort in cohorts]
            if launched is None and following is None:
                break
            launched = following
    smoothed.recheck()


def noise_streams(smoothed: SmoothedClassifier, seed: int, image_id: str) -> tuple[torch.Generator, torch.Generator]:
    """Return the generators of the noise that selects the class of an image and of the noise for its bound."""
    selection, estimation = (
        smoothed.streams(seed, f"certify-{purpose}", [image_id])[0] for purpose in ("selection", "estimation")
    )
    return selection, estimation


class _Running:
    """Certified accuracy of the images decided so far, in words."""

    def __init__(self, rule: Rule) -> None:
        self._norm, self._radius = rule.norm, 0.0 if rule.radii is None else rule.radii[0]
        self._certified = self._images = 0

    def after(self, certificate: Certificates) -> str:
        self._images += 1
        self._certified += int(certificate.certified(self._radius)[0])
        return f"{self._certified / self._images:.1%} certified at {self._norm} {self._radius:g}"


@dataclass(eq=False)
class _InProgress:
    """An image whose votes are being drawn.

    Attributes:
        picture: hash of the pixels.
        generators: generators of the selection and the estimation noise.
        selection, counts: int64 (K,), selection and estimation votes read so far.
        blocks: votes in each estimation block read so far, for the selected class or, where the rule needs them, for
            every class, uint8 (K,).
        issued: estimation votes launched, read or not.
        trials: estimation votes read.
        passed, outcome, done: state of the rule after the last block.
        seconds: the image's share of the time of its rounds.
    """

    position: int
    pixels: Tensor
    label: int
    image_id: str
    picture: str
    generators: tuple[torch.Generator, torch.Generator]
    selection: NDArray[np.int64]
    counts: NDArray[np.int64]
    blocks: list[int | NDArray[np.uint8]] = field(default_factory=list)
    issued: int = 0
    trials: int = 0
    passed: int = 0
    outcome: int = 0
    done: bool = False
    seconds: float = 0.0

    @property
    def selected(self) -> int:
        return int(self.selection.argmax())

    @property
    def state(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
        """The arguments of ``Decider.conclude`` for this image, each with a leading dimension of 1."""
        passed, outcome = np.array([self.passed], np.int64), np.array([self.outcome], np.uint8)
        return self.selection[None], self.counts[None], passed, outcome


@dataclass
class _Round:
    """Blocks launched together: for each the image, whether it selects, and its number of votes."""

    blocks: list[tuple[_InProgress, bool, int]]
    pending: PendingVotes


class _Engine:
    def __init__(self, smoothed: SmoothedClassifier, decider: Decider, capacity: int) -> None:
        self._smoothed, self._decider, self._capacity = smoothed, decider, capacity
        self._rule, self._counter = decider.rule, smoothed.vote_counter()
        self._model = smoothed.fingerprint()
        self._last_read = time.perf_counter()

    def enter(self, pixels: LabelledPixels, position: int, seed: int) -> _InProgress:
        """Begin with the image at ``position``."""
        image_id, classes = pixels.ids[position], self._smoothed.num_classes
        return _InProgress(
            position=position,
            pixels=sent(pixels.x[position].float(), self._smoothed.execution.device),
            label=int(pixels.y[position]),
            image_id=image_id,
            picture=pixel_ids(pixels.x[position][None])[0],
            generators=noise_streams(self._smoothed, seed, image_id),
            selection=np.zeros(classes, np.int64),
            counts=np.zeros(classes, np.int64),
        )

    def launch(self, images: Sequence[_InProgress]) -> _Round:
        """Queue the next blocks of ``images``, and those that select the class of images that have just entered."""
        blocks: list[tuple[_InProgress, bool, int]] = []
        share = max(1, self._capacity // len(images))  # blocks per image that fill the round
        for image in images:
            if image.issued == 0:
                blocks += [(image, True, votes) for votes in _block_sizes(0, self._rule.num_selection)]
            # A sequential path may end at any block: launch at most a quarter of what the image has drawn so far.
            ahead = share if self._rule.method == "clopper-pearson" else min(share, 1 + image.issued // (4 * BLOCK))
            until = min(self._rule.num_estimation, image.issued + ahead * BLOCK)
            blocks += [(image, False, votes) for votes in _block_sizes(image.issued, until)]
            image.issued = until
        requests = (VoteRequest(image.pixels, image.generators[not selects], votes) for image, selects, votes in blocks)
        return _Round(blocks, self._counter.launch(requests, len(blocks)))

    def collect(self, launched: _Round) -> list[_InProgress]:
        """Read the votes of a round, apply the rule block by block, and return the images that are decided now."""
        votes = launched.pending.result().numpy()  # (blocks, K)
        now = time.perf_counter()
        seconds, self._last_read = (now - self._last_read) / len(votes), now
        paths: dict[_InProgress, list[tuple[NDArray[np.int64], int]]] = {}
        for (image, selects, size), block in zip(launched.blocks, votes, strict=True):
            image.seconds += seconds
            if selects:
                image.selection += block
            else:
                paths.setdefault(image, []).append((block, size))
        # All images take their next block at once, so that one vectorised look decides them. Blocks of a path after
        # the one that decides it stay unread.
        for step in range(max(map(len, paths.values()))):
            undecided = [image for image, path in paths.items() if step < len(path) and not image.done]
            self._look([(image, *paths[image][step]) for image in undecided])
        return [image for image in paths if image.done]

    def certificate(self, image: _InProgress, certified: Certified, outcome: NDArray[np.uint8]) -> Certificates:
        """Return the certificate of an image, with all that is recorded about it."""
        return Certificates(
            prediction=certified.prediction,
            radius=certified.radius,
            p_lower=certified.p_lower,
            num_samples=np.array([self._rule.num_selection + image.trials], np.int64),
            counts=image.counts[None],
            blocks=(np.array(image.blocks, np.uint8),),
            selection=image.selection[None],
            outcome=outcome,
            seconds=np.array([image.seconds]),
            labels=np.array([image.label], np.int64),
            ids=(image.image_id,),
            rule=self._rule,
            pixels=(image.picture,),
            model=self._model,
        )

    def _look(self, step: Sequence[tuple[_InProgress, NDArray[np.int64], int]]) -> None:
        """Add one block (votes (K,), size) to each of some images, and apply the rule."""
        if not step:
            return
        for image, block, size in step:
            image.counts += block
            image.blocks.append(block.astype(np.uint8) if self._rule.needs_every_class else int(block[image.selected]))
            image.trials += size
        images = [image for image, _, _ in step]
        passed = np.array([image.passed for image in images], np.int64)
        successes = np.array([image.counts[image.selected] for image in images], np.int64)
        trials = np.array([image.trials for image in images], np.int64)
        rivals: tuple[ArrayLike, ArrayLike] = (0, 1)
        if self._rule.needs_every_class:
            rivals = rivals_of(np.stack([image.selection for image in images]), np.stack([i.counts for i in images]))
        for image, *state in zip(images, *self._decider.look(passed, successes, trials, rivals), strict=True):
            image.passed, image.outcome, image.done = int(state[0]), int(state[1]), bool(state[2])


def _block_sizes(before: int, until: int) -> list[int]:
    """Return the sizes of the blocks from vote ``before``, a multiple of 100, to vote ``until``."""
    return [min(BLOCK, until - start) for start in range(before, until, BLOCK)]


def _cohort_sizes(rule: Rule, capacity: int, in_flight: int | None) -> tuple[int, int]:
    """Return the number of images of each cohort.

    They fill a round with one block each, or, where a fixed number of votes is needed, with all of their blocks.
    """
    if in_flight is None:
        blocks = -(-rule.num_estimation // BLOCK) if rule.method == "clopper-pearson" else 1
        in_flight = 2 * max(1, capacity // blocks)
    return -(-in_flight // 2), in_flight // 2
