"""Tokens to batches, in an order that belongs to the run and not to its ranks.

The tokens are cut into samples of `seq_len + 1`; each epoch goes through them in an order of its
own, drawn from the seed. Numbered on through the epochs, that is one endless row of samples, and
all that a loader has to remember is how many were taken: resuming, also on another number of
ranks, goes on with the very next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from holdfast.errors import MismatchError, UsageError
from holdfast.trainer.corpus import Tokens


class DataLoader:
    """One data-parallel rank's share of every step's samples."""

    state_is_global: ClassVar[bool] = True
    """Every rank has the same state, and any number of ranks can take it."""

    def __init__(
        self,
        tokens: Tokens,
        *,
        seq_len: int,
        seed: int,
        batch_per_rank: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        """Raises UsageError where the data are shorter than one sample."""
        self._tokens = tokens
        self._seq_len = seq_len
        self._seed = seed
        self._batch_per_rank = batch_per_rank
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._position = 0
        self._num_samples = (len(tokens.ids) - 1) // seq_len
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None
        if self._num_samples < 1:
            raise UsageError(
                f"the data set has {len(tokens.ids)} tokens, too few for one sequence of "
                f"`training.seq_len` + 1: {seq_len + 1}"
            )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Input tokens and the ones that follow them, each `(batch_per_rank, seq_len)`.

        Never ends: after the last sample the next epoch begins, in another order.
        """
        first = self._position + self._dp_rank * self._batch_per_rank
        self._position += self._batch_per_rank * self._dp_size
        rows = np.stack([self._sample(first + i) for i in range(self._batch_per_rank)])
        together = torch.from_numpy(rows)
        return together[:, :-1], together[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        """Plain values, the same on every rank."""
        return {"position": self._position, **self._identity()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on after the samples that were taken when `state_dict` was.

        Raises:
            MismatchError: it counts samples of other data, or in another order.
        """
        unlike = [
            f"`{key}` is {state_dict.get(key)} in the checkpoint and {value} here"
            for key, value in self._identity().items()
            if state_dict.get(key) != value
        ]
        if unlike:
            raise MismatchError(
                "the position in the data does not fit the data: " + "; ".join(unlike),
                hint="--checkpoint.exclude_from_loading dataloader starts these data from the "
                "beginning and resumes everything else",
            )
        self._position = int(state_dict["position"])

    def _identity(self) -> dict[str, Any]:
        """All that decides what the sample of a number is."""
        return {
            "fingerprint": self._tokens.fingerprint,
            "seq_len": self._seq_len,
            "seed": self._seed,
        }

    def _sample(self, number: int) -> npt.NDArray[np.int64]:
        epoch, index = divmod(number, self._num_samples)
        if self._order is None or self._order[0] != epoch:
            drawn = np.random.default_rng([self._seed, epoch]).permutation(self._num_samples)
            self._order = (epoch, drawn)
        start = int(self._order[1][index]) * self._seq_len
        return self._tokens.ids[start : start + self._seq_len + 1].astype(np.int64)
