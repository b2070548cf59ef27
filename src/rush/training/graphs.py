"""A training step captured once as a CUDA graph and replayed, which queues thousands of kernels with one call.

A replay repeats the kernels of the capture on the same memory, and no Python of the step runs. What changes from step
to step is therefore written into static memory first: the batch, the seed of the generator, the learning rate, and
every number that follows the epoch (``runtime.schedules``). The bits are those of the plain step. On other devices
nothing is captured and a replay runs the step, on the same static memory.
"""

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from rush.data.batches import Batch
from rush.errors import ConfigError, RushError
from rush.runtime.lines import one_line
from rush.runtime.schedules import TURN_OFF, FollowedEpoch

WARM_UP = 2  # plain steps before the capture, after which the libraries are loaded and the optimizer has its state


class CapturedStep:
    """A step that is taken eagerly at first, then captured, and replayed from then on.

    Args:
        step: the whole step, from a batch, the epochs done so far and the generator to its loss.
        device: where it runs.
        prepare: called with True before the capture and with False after it, to prepare for it what ``step`` uses.
    """

    def __init__(
        self,
        step: Callable[[Batch, float, torch.Generator], Tensor],
        device: str,
        prepare: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._step, self._prepare = step, prepare
        self._generator = torch.Generator(device=device)
        on_cuda = torch.device(device).type == "cuda"
        self._recorder: _CudaGraph | _Rerun = _CudaGraph(device, self._generator) if on_cuda else _Rerun()
        self._batch: Batch | None = None
        self._epoch = FollowedEpoch(device)
        self._plain_steps, self._captured = 0, False

    def __call__(self, batch: Batch, epoch: float, reseed: Callable[[torch.Generator], object]) -> Tensor:
        """Take a step and return its loss, which the next call overwrites.

        Args:
            batch: a batch of the same size as every other one.
            epoch: epochs done so far.
            reseed: sets the generator that it is given to the stream of this step.

        Raises:
            ConfigError: the step cannot be captured.
        """
        self._fill(batch)
        self._epoch.fill(epoch)
        reseed(self._generator)
        if self._plain_steps < WARM_UP:
            self._plain_steps += 1
            return self._recorder.plain(self._run)
        if not self._captured:
            self._capture()
        return self._recorder.replay()

    def _run(self) -> Tensor:
        assert self._batch is not None
        return self._step(self._batch, self._epoch, self._generator)

    def _fill(self, batch: Batch) -> None:
        if self._batch is None:
            labels = None if batch.labels is None else torch.empty_like(batch.labels)
            self._batch = Batch(torch.empty_like(batch.images), labels)
        if batch.images.shape != self._batch.images.shape:
            shape, expected = tuple(batch.images.shape), tuple(self._batch.images.shape)
            raise ConfigError(f"a captured step takes batches of shape {expected}, got {shape}; {TURN_OFF}")
        self._batch.images.copy_(batch.images)
        if batch.labels is not None and self._batch.labels is not None:
            self._batch.labels.copy_(batch.labels)

    def _capture(self) -> None:
        self._epoch.closed = True
        self._prepare(True)
        try:
            self._recorder.record(self._run)
        except (RushError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the step does that a graph cannot hold
            raise ConfigError(
                f"the training step cannot be captured as a CUDA graph ({one_line(error)}); {TURN_OFF}"
            ) from error
        finally:
            self._prepare(False)
        self._captured = True


class _Rerun:
    """Recorder that stores the function itself."""

    def plain(self, function: Callable[[], Tensor]) -> Tensor:
        """Return ``function()``, run as a preparation of the capture."""
        return function()

    def record(self, function: Callable[[], Tensor]) -> None:
        """Record ``function`` without running it."""
        self._function = function

    def replay(self) -> Tensor:
        """Run the recorded function and return its result."""
        return self._function()


class _CudaGraph:
    """Recorder of the kernels that the function queues, with the generator that they draw from.

    Plain steps and capture share one separate stream: nodes of autograd that outlive a step would otherwise make the
    capture wait for another stream, which is not allowed.
    """

    def __init__(self, device: str, generator: torch.Generator) -> None:
        self._stream = torch.cuda.Stream(device)
        self._generator = generator
        self._graph: torch.cuda.CUDAGraph | None = None

    def plain(self, function: Callable[[], Tensor]) -> Tensor:
        outer = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            result = function()
        outer.wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], Tensor]) -> None:
        gc.collect()  # tensors in cycles would be freed during the capture
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        # Other threads, which decode images into pinned memory, may allocate it meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._result = function()
        self._graph = graph

    def replay(self) -> Tensor:
        assert self._graph is not None
        self._graph.replay()
        return self._result
