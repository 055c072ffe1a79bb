"""Batches of tokens, in an order that does not depend on the number of ranks.

The data is cut into samples of `seq_len + 1` tokens; neighbouring samples share one token. Each
epoch visits all samples in a random order. A loader's only counter is the number of samples that
the run has taken, over all epochs, so a resume on any number of ranks continues with the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from holdfast.data import EpochOrder, state_differences
from holdfast.errors import MismatchError, UsageError
from holdfast.trainer.corpus import Tokens


@dataclass(kw_only=True, eq=False)
class DataLoader:
    """Iterator over batches: for each step, one data-parallel rank's share of the samples."""

    state_is_global: ClassVar[bool] = True
    """Whether every rank has the same state, so that any number of ranks can load it."""

    tokens: Tokens
    seq_len: int
    seed: int
    batch_per_rank: int
    dp_rank: int = 0
    dp_size: int = 1

    def __post_init__(self) -> None:
        self._position = 0
        self._num_samples = (len(self.tokens.ids) - 1) // self.seq_len
        self._order = EpochOrder(self._num_samples, self.seed)
        if self._num_samples < 1:
            raise UsageError(
                f"the data set has {len(self.tokens.ids)} tokens, too few for one sequence of "
                f"`training.seq_len` + 1: {self.seq_len + 1}"
            )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Return input tokens and their labels, each `(batch_per_rank, seq_len)`.

        Never ends: the next epoch, in another order, follows the last sample.
        """
        first = self._position + self.dp_rank * self.batch_per_rank
        self._position += self.batch_per_rank * self.dp_size
        rows = np.stack([self._sample(first + i) for i in range(self.batch_per_rank)])
        samples = torch.from_numpy(rows)
        return samples[:, :-1], samples[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        """Return the number of samples taken, and the properties of the data."""
        return {"position": self._position, **self._identity()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue after the samples that `state_dict` counts as taken.

        Raises:
            MismatchError: the state is of other data, or of another order of samples.
        """
        if differences := state_differences(state_dict, self._identity()):
            raise MismatchError(
                "the checkpoint's position in the data is of other data: " + "; ".join(differences),
                hint="--checkpoint.exclude_from_loading dataloader starts these data from the "
                "beginning and resumes everything else",
            )
        self._position = int(state_dict["position"])

    def _identity(self) -> dict[str, Any]:
        """Return the properties that decide which tokens each sample has."""
        return {
            "fingerprint": self.tokens.fingerprint,
            "seq_len": self.seq_len,
            "seed": self.seed,
        }

    def _sample(self, number: int) -> npt.NDArray[np.int64]:
        epoch, index = divmod(number, self._num_samples)
        start = self._order.sample(epoch, index) * self.seq_len
        return self.tokens.ids[start : start + self.seq_len + 1].astype(np.int64)
