"""Certification of a data set by continuous batching: images enter and leave the running batch as they are decided.

Every image has noise of its own (``stream(seed, "certify-selection", id)`` and ``"certify-estimation"``), drawn in
blocks of 100, and is looked at after every block of its own path. What is drawn beyond the block that decides is thrown
away unseen. A certificate is therefore a function of the image, the seed and the rule: neither the number of images in
flight nor their order, neither the tile's other rows nor the number of processes changes a bit of it.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rush.certification.apply_rule import Decider
from rush.certification.certificates import Certificates, join_certificates
from rush.certification.rule import Rule, make_rule
from rush.choices import CertifyMethod, Level
from rush.data.checks import Images, LabelledPixels, labelled_pixels, pixel_ids
from rush.recipe.schema import CertifyConfig
from rush.runtime.distributed import gather_objects, rank, world_size
from rush.runtime.numbers import positive_integer
from rush.runtime.progress import progress
from rush.runtime.transfer import sent
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.votes import BLOCK, PendingVotes, Request

_DEFAULTS = CertifyConfig()
_ROUND_TILES = 25  # tiles launched together before anything is read back


def certify(
    smoothed: SmoothedClassifier,
    images: Images,
    method: CertifyMethod = _DEFAULTS.method,
    num_selection: int = _DEFAULTS.num_selection,
    num_estimation: int = _DEFAULTS.num_estimation,
    alpha: float = _DEFAULTS.alpha,
    radii: Sequence[float] | None = _DEFAULTS.radii,
    level: Level = _DEFAULTS.level,
    futility: float = _DEFAULTS.futility,
    seed: int = 0,
    in_flight: int | None = None,
) -> Certificates:
    """Certificates of all images, in their order.

    images: an ImageSet with labels, or a pair (float images (N, C, H, W) in [0, 1], labels (N,)).
    method: ``clopper-pearson`` draws ``num_estimation`` samples an image (Cohen et al. 2019, algorithm CERTIFY);
    ``sequential`` draws until the radii are decided, at most so many (``certification.sequential``). Either selects the
    class on ``num_selection`` samples of their own.
    radii: the grid of radii, in pixel units, taken to six decimals upwards; None: any radius for ``clopper-pearson``; 0
    and the multiples of sigma / 2 within reach for ``sequential``. Few radii cost few samples.
    level: ``image``: each certificate by itself is false with probability <= alpha; ``family``: all of them hold
    together with probability >= 1 - alpha (alpha / N each).
    futility: probability of giving up a radius that could be certified (``sequential``); never unsound.
    in_flight: images sampled at once; changes no result. With torch.distributed initialised the images are shared among
    the processes, and each returns all certificates.
    Raises: InputError for bad images, labels or numbers, a radius beyond what ``num_estimation`` can certify among
    them; ModelError for a classifier that cannot be certified (training mode, stochastic, dependent on neighbours, or
    no longer the same function at the end).
    """
    pixels = labelled_pixels(images, smoothed.num_classes, smoothed.kind)
    smoothed.check_shape(pixels.x.shape[1:])
    rule = make_rule(
        sigma=smoothed.sigma,
        method=method,
        alpha=alpha,
        level=level,
        num_images=len(pixels),
        num_selection=num_selection,
        num_estimation=num_estimation,
        radii=radii,
        futility=futility,
    )
    own = list(range(rank(), len(pixels), world_size()))
    found = dict(certify_each(smoothed, pixels, rule, seed, own, in_flight))
    smoothed.answered(pixels.x.shape[1:])
    shared = {position: part for shard in gather_objects(found) for position, part in shard.items()}
    return join_certificates([shared[position] for position in range(len(pixels))])


def certify_each(
    smoothed: SmoothedClassifier,
    pixels: LabelledPixels,
    rule: Rule,
    seed: int,
    positions: Sequence[int],
    in_flight: int | None = None,
) -> Iterator[tuple[int, Certificates]]:
    """(position, its certificate) for the images at ``positions``, as soon as each is decided; the checked inside of
    ``certify``.

    Two cohorts of images take turns: while the device counts the votes of one, the other's are looked at.

    Raises:
        ModelError: as ``certify``. If the iteration ends with one, no certificate that it yielded is valid.
    """
    if in_flight is not None:
        in_flight = positive_integer("in_flight", in_flight)
    capacity = max(1, _ROUND_TILES * smoothed.execution.tile // BLOCK)
    engine = _Engine(smoothed, rule, capacity)
    cohorts = _cohort_sizes(rule, capacity, in_flight)
    waiting = iter(positions)
    flights: list[list[_Flight]] = [[] for _ in cohorts]
    launched: _Round | None = None
    with progress("certify", len(positions)) as advance:
        for turn in itertools.cycle(range(len(cohorts))):
            entering = itertools.islice(waiting, cohorts[turn] - len(flights[turn]))
            flights[turn] += [engine.enter(pixels, position, seed) for position in entering]
            following = engine.launch(flights[turn]) if flights[turn] else None
            for flight in engine.land(launched) if launched else ():
                yield flight.position, engine.certificate(flight)
                advance(1)
            flights = [[flight for flight in cohort if not flight.done] for cohort in flights]
            if launched is None and following is None:
                break
            launched = following
    smoothed.recheck()


@dataclass(eq=False)
class _Flight:
    """An image whose votes are being drawn; ``issued`` estimation votes are drawn or under way."""

    position: int
    pixels: Tensor
    label: int
    own: str
    picture: str  # hash of the pixels
    generators: tuple[torch.Generator, torch.Generator]  # selection, estimation
    selection: NDArray[np.int64]
    counts: NDArray[np.int64]
    blocks: list[int] = field(default_factory=list)
    issued: int = 0
    trials: int = 0
    passed: int = 0
    outcome: int = 0
    done: bool = False
    seconds: float = 0.0

    @property
    def selected(self) -> int:
        return int(self.selection.argmax())


@dataclass
class _Round:
    """Blocks launched together: for each the flight, whether it selects, and its number of votes."""

    blocks: list[tuple[_Flight, bool, int]]
    pending: PendingVotes


class _Engine:
    def __init__(self, smoothed: SmoothedClassifier, rule: Rule, capacity: int) -> None:
        self._smoothed, self._rule, self._capacity = smoothed, rule, capacity
        self._voter, self._decider = smoothed.voter(), Decider(rule)
        self._model = smoothed.fingerprint()
        self._landed = time.perf_counter()

    def enter(self, pixels: LabelledPixels, position: int, seed: int) -> _Flight:
        own, classes = pixels.ids[position], self._smoothed.num_classes
        selection, estimation = (
            self._smoothed.streams(seed, f"certify-{purpose}", [own])[0] for purpose in ("selection", "estimation")
        )
        return _Flight(
            position=position,
            pixels=sent(pixels.x[position].float(), self._smoothed.execution.device),
            label=int(pixels.y[position]),
            own=own,
            picture=pixel_ids(pixels.x[position][None])[0],
            generators=(selection, estimation),
            selection=np.zeros(classes, np.int64),
            counts=np.zeros(classes, np.int64),
        )

    def launch(self, flights: Sequence[_Flight]) -> _Round:
        """Queue the next blocks of ``flights``; at first also those that select the class."""
        blocks: list[tuple[_Flight, bool, int]] = []
        share = max(1, self._capacity // len(flights))
        for flight in flights:
            if flight.issued == 0:
                blocks += [(flight, True, votes) for votes in _block_sizes(0, self._rule.num_selection)]
            ahead = share if self._rule.method == "clopper-pearson" else min(share, 1 + flight.issued // (4 * BLOCK))
            until = min(self._rule.num_estimation, flight.issued + ahead * BLOCK)
            blocks += [(flight, False, votes) for votes in _block_sizes(flight.issued, until)]
            flight.issued = until
        requests = (Request(flight.pixels, flight.generators[not selects], votes) for flight, selects, votes in blocks)
        return _Round(blocks, self._voter.launch(requests, len(blocks)))

    def land(self, round_: _Round) -> list[_Flight]:
        """Look at the votes of a round, block after block; returns the flights that are decided now."""
        votes = round_.pending.result().numpy()
        now = time.perf_counter()
        seconds, self._landed = (now - self._landed) / len(votes), now
        paths: dict[_Flight, list[tuple[NDArray[np.int64], int]]] = {}
        for (flight, selects, size), counted in zip(round_.blocks, votes, strict=True):
            flight.seconds += seconds
            if selects:
                flight.selection += counted
            else:
                paths.setdefault(flight, []).append((counted, size))
        for step in range(max(map(len, paths.values()))):
            open_ = [flight for flight, path in paths.items() if step < len(path) and not flight.done]
            self._look([(flight, *paths[flight][step]) for flight in open_])
        return [flight for flight in paths if flight.done]

    def certificate(self, flight: _Flight) -> Certificates:
        certified, outcome = self._decider.conclude(
            selected=np.array([flight.selected], np.int64),
            successes=np.array([sum(flight.blocks)], np.int64),
            trials=np.array([flight.trials], np.int64),
            passed=np.array([flight.passed], np.int64),
            outcome=np.array([flight.outcome], np.uint8),
        )
        return Certificates(
            prediction=certified.prediction,
            radius=certified.radius,
            p_lower=certified.p_lower,
            num_samples=np.array([self._rule.num_selection + flight.trials], np.int64),
            counts=flight.counts[None],
            blocks=(np.array(flight.blocks, np.uint8),),
            selection=flight.selection[None],
            outcome=outcome,
            seconds=np.array([flight.seconds]),
            labels=np.array([flight.label], np.int64),
            ids=(flight.own,),
            rule=self._rule,
            pixels=(flight.picture,),
            model=self._model,
        )

    def _look(self, step: Sequence[tuple[_Flight, NDArray[np.int64], int]]) -> None:
        if not step:
            return
        for flight, counted, size in step:
            flight.counts += counted
            flight.blocks.append(int(counted[flight.selected]))
            flight.trials += size
        flights = [flight for flight, _, _ in step]
        passed = np.array([flight.passed for flight in flights], np.int64)
        successes = np.array([flight.counts[flight.selected] for flight in flights], np.int64)
        trials = np.array([flight.trials for flight in flights], np.int64)
        for flight, *state in zip(flights, *self._decider.look(passed, successes, trials), strict=True):
            flight.passed, flight.outcome, flight.done = int(state[0]), int(state[1]), bool(state[2])


def _block_sizes(before: int, until: int) -> list[int]:
    """Votes of the blocks from vote ``before`` (a multiple of 100) to ``until``."""
    return [min(BLOCK, until - start) for start in range(before, until, BLOCK)]


def _cohort_sizes(rule: Rule, capacity: int, in_flight: int | None) -> tuple[int, int]:
    """Images in each cohort: as many as fill a round by a block each, or by all their blocks where all are needed."""
    if in_flight is None:
        blocks = -(-rule.num_estimation // BLOCK) if rule.method == "clopper-pearson" else 1
        in_flight = 2 * max(1, capacity // blocks)
    return -(-in_flight // 2), in_flight // 2
