"""Data loaders whose position is one number for the whole run, so any number of ranks can resume.

batches = GlobalBatches(len(dataset), global_batch_size=64, rank=rank, num_ranks=world_size)
loader = ElasticLoader(DataLoader(dataset, batch_sampler=batches))
manager = CheckpointManager(..., dataloader=loader)
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from holdfast.arguments import shown, whole_number
from holdfast.errors import MismatchError, UsageError

T = TypeVar("T", covariant=True)

_HINT = "exclude the data loader from this load to start these data from the beginning"

_ORDER_SAMPLES = 64
"""Number of samples at the start of an epoch that the checksum of the order covers."""


class EpochOrder:
    """Order of the samples in each epoch, which depends on the seed and the epoch alone."""

    def __init__(self, num_samples: int, seed: int) -> None:
        self._num_samples, self._seed = num_samples, seed
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None
        """Epoch of the last call of `sample`, and its order."""

    def sample(self, epoch: int, index: int) -> int:
        """Return the sample at position `index` of an epoch."""
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(self._num_samples)
            self._order = (epoch, order)
        return int(self._order[1][index])


def state_differences(state: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Return one line per property of a data loader that differs between its saved state, `state`,
    and `own`, the properties of the present loader."""
    return [
        f"`{key}` is {state.get(key)} in the checkpoint and {value} here"
        for key, value in own.items()
        if state.get(key) != value
    ]


class GlobalBatches:
    """Batch sampler of one data-parallel rank: its share of every global batch of a data set.

    The order of samples depends on the seed and the epoch alone, so each global batch has the same
    samples on any number of ranks. Every rank has equally many batches, all of them full: the last
    global batch of an epoch is completed with the first samples of the next epoch, and the next
    epoch continues after these samples. No sample is repeated or left out.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        global_batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        """`num_samples`: length of the data set. `global_batch_size`: samples that all ranks take
        together in one batch. `rank`, `num_ranks`: this data-parallel rank, and how many there
        are. Without `shuffle`, every epoch has the order of the data set.

        Raises:
            UsageError: an argument has the wrong type or is out of range, or `num_ranks` does not
                divide `global_batch_size`.
        """
        self.num_samples: int = _at_least("num_samples", num_samples, 1)
        self.global_batch_size: int = _at_least("global_batch_size", global_batch_size, 1)
        self.num_ranks: int = _at_least("num_ranks", num_ranks, 1)
        self.rank: int = _at_least("rank", rank, 0)
        self.seed: int = _at_least("seed", seed, 0)
        self.shuffle = shuffle
        if self.rank >= self.num_ranks:
            raise UsageError(f"`rank` must be less than `num_ranks`, {num_ranks}, found: {rank}")
        if self.global_batch_size % self.num_ranks:
            raise UsageError(
                f"`global_batch_size` must be a multiple of `num_ranks`, {num_ranks}, found: "
                f"{global_batch_size}",
                hint="ranks with different numbers of samples would weigh them differently",
            )
        self.position = 0
        """Number of samples that all ranks together have taken before the next batch, over all
        epochs."""

        self._order = EpochOrder(self.num_samples, self.seed)

    def __len__(self) -> int:
        """Number of batches in the rest of the epoch."""
        left = self.num_samples - self.position % self.num_samples
        return -(-left // self.global_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the samples of this rank in each batch in the rest of the epoch."""
        size = self.global_batch_size // self.num_ranks
        first = self.position + self.rank * size
        for _ in range(len(self)):
            yield [self._sample(number) for number in range(first, first + size)]
            first += self.global_batch_size

    def identity(self, epoch: int) -> dict[str, Any]:
        """Properties that decide which sample is at each position of an epoch, with a checksum of
        the first samples."""
        first = [self._in_epoch(epoch, i) for i in range(min(self.num_samples, _ORDER_SAMPLES))]
        return {
            "num_samples": self.num_samples,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "order": zlib.crc32(np.array(first, dtype="<i8").tobytes()),
        }

    def _sample(self, number: int) -> int:
        return self._in_epoch(*divmod(number, self.num_samples))

    def _in_epoch(self, epoch: int, index: int) -> int:
        return self._order.sample(epoch, index) if self.shuffle else index


class _Loader(Protocol[T]):
    """A DataLoader, StatefulDataLoader, or another loader with a batch sampler."""

    @property
    def batch_sampler(self) -> Any: ...

    def __iter__(self) -> Iterator[T]: ...


class ElasticLoader(Generic[T]):
    """Data loader that resumes on any number of ranks with the next samples.

    A loop over the loader yields the batches in the rest of the epoch. The next loop yields those
    of the next epoch, or continues a loop that ended early. The state is the number of samples that
    the run has taken, even if workers of the loader have read further ahead.
    """

    state_is_global: ClassVar[bool] = True
    """Whether every rank has the same state, so that any number of ranks can load it."""

    def __init__(self, loader: _Loader[T]) -> None:
        """`loader`: a `DataLoader` or `StatefulDataLoader` with a `GlobalBatches` as its
        `batch_sampler`, over a map-style data set, such as one of Hugging Face.

        Raises:
            UsageError: the loader has another batch sampler.
        """
        batches = getattr(loader, "batch_sampler", None)
        if not isinstance(batches, GlobalBatches):
            raise UsageError(
                "`loader` must have a `GlobalBatches` as its `batch_sampler`, found: "
                f"{shown(batches)}",
                hint="`DataLoader(dataset, batch_sampler=GlobalBatches(len(dataset), ...))`",
            )
        self._loader: Iterable[T] = loader
        self.batches = batches

    @property
    def epoch(self) -> int:
        """Number of epochs that are complete."""
        return self.batches.position // self.batches.num_samples

    def __len__(self) -> int:
        """Number of batches in the rest of the epoch."""
        return len(self.batches)

    def __iter__(self) -> Iterator[T]:
        """Yield the batches in the rest of the epoch."""
        for batch in self._iterator():
            self.batches.position += self.batches.global_batch_size
            yield batch

    def _iterator(self) -> Iterator[T]:
        import torch

        # A DataLoader draws a seed for its workers from torch's generator. A resumed run makes its
        # iterator in the middle of an epoch, and would then continue with other random numbers
        # than a run that was never interrupted.
        random_state = torch.get_rng_state()
        iterator = iter(self._loader)
        torch.set_rng_state(random_state)
        return iterator

    def state_dict(self) -> dict[str, Any]:
        """Return the number of samples taken, and the properties that identify their order."""
        return {"position": self.batches.position, **self.batches.identity(self.epoch)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue after the samples that `state_dict` counts.

        Raises:
            MismatchError: the state is of other data, or of another order of the samples.
        """
        position = whole_number(state_dict.get("position"))
        if position is None or position < 0:
            raise MismatchError(
                "the checkpoint's state of the data loader was saved by another loader", hint=_HINT
            )
        own = self.batches.identity(position // self.batches.num_samples)
        if differences := state_differences(state_dict, own):
            raise MismatchError(
                "the checkpoint's position in the data is of other data, or of another order: "
                + "; ".join(differences),
                hint=_HINT,
            )
        self.batches.position = position


def _at_least(name: str, value: object, least: int) -> int:
    number = whole_number(value)
    if number is None or number < least:
        raise UsageError(
            f"`{name}` must be a whole number of at least {least}, found: {shown(value)}"
        )
    return number
