"""The parts of a step, by TorchTitan's names, and what is known of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from holdfast.catalog.findings import PARTS
from holdfast.errors import HoldfastError, MismatchError, UsageError
from holdfast.format.manifest import Manifest
from holdfast.loading.load import Loaded
from holdfast.manager.config import DATALOADER_KEYS
from holdfast.state.dataloader import loader_component
from holdfast.state.rng import RngState
from holdfast.state.stateful import RANK, ObjectState, RankState
from holdfast.state.tree import Stateful

MODEL, OPTIMIZER, SCHEDULER, DATALOADER, RNG = (
    *("model", "optimizer", "lr_scheduler"),
    *("dataloader", "rng"),
)
"""Names of the parts of a step; TorchTitan's. The model's own names lie at the top level."""

T = TypeVar("T")


def many(given: T | Sequence[T]) -> list[T]:
    """One object or several, as a list."""
    return list(given) if isinstance(given, Sequence) else [given]


def beside(dataloader: Stateful | None, rank: int) -> dict[str, Any]:
    """What each rank has for itself: its place in the data, and its random numbers. These come
    last: whatever makes an iterator or a worker draws from them."""
    loader = {} if dataloader is None else {DATALOADER: loader_component(dataloader, rank)}
    return {**loader, RNG: RankState(ObjectState(RngState()), rank, may_lack=True)}


def not_excluded(parts: Collection[str], excluded: Collection[str]) -> list[str]:
    """The parts that a resume loads."""
    left_out = {DATALOADER if name in DATALOADER_KEYS else name for name in excluded}
    return [name for name in parts if name not in left_out]


def left_alone(
    manifest: Manifest, wanted: Sequence[str], excluded: Collection[str] = ()
) -> set[str]:
    """Top-level names of a checkpoint that a load of these parts leaves as they are, whether or not
    this run has parts of these names: what was excluded and, where the model alone is wanted, all
    that is not the model's."""
    names = {DATALOADER if name in DATALOADER_KEYS else name for name in excluded}
    if [*wanted] == [MODEL]:
        names |= {*(PARTS if manifest.components is None else manifest.components)}
    return names


def check_excluded(excluded: Sequence[str], parts: Collection[str]) -> None:
    """Refuse names that are those of no part.

    Raises:
        UsageError: the first of them, with the nearest that is.
    """
    known = {*parts, *DATALOADER_KEYS} - {MODEL}
    for name in excluded:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                f"`checkpoint.exclude_from_loading` names `{name}`, which is no part of a step",
                hint=f"did you mean `{near[0]}`?" if near else f"parts: {', '.join(sorted(known))}",
            )


def check_dataloader(manifest: Manifest, num_ranks: int) -> None:
    """A loader's state by ranks fits as many ranks only.

    Raises:
        MismatchError: another number of ranks has saved it.
    """
    paths = [tensor.path for tensor in manifest.tensors.values()]
    paths += [value.path for value in manifest.values.values()]
    kept = {str(path[1]) for path in paths if path[0] == DATALOADER and len(path) > 1}
    by_rank = {key for key in kept if key.startswith(RANK)}
    if by_rank and by_rank != {f"{RANK}{rank}" for rank in range(num_ranks)}:
        raise MismatchError(
            f"the data loader's state was saved by {len(by_rank)} ranks, for each its own; "
            f"this run has {num_ranks}",
            hint='`checkpoint.exclude_from_loading = ["dataloader"]` starts the data afresh',
        )


def way_on(error: HoldfastError, parts: Collection[str]) -> str | None:
    """What a run can do about a checkpoint that does not fit, if only some of `parts` do not: the
    setting that leaves these out."""
    named = {name.partition(".")[0] for name in re.findall(r"`([^`/]+)`", error.what)}
    unfit = sorted(named & {*parts})
    if not unfit:
        return None
    return (
        "the model fits, what wrote the rest was another program or another setting: "
        f"`--checkpoint.exclude_from_loading {','.join(unfit)}` starts that afresh"
        if _is_all(error.what, parts)
        else "is it a checkpoint of another model? `--checkpoint.exclude_from_loading` leaves out "
        f"whole parts, such as {', '.join(unfit)}"
    )


def _is_all(what: str, parts: Collection[str]) -> bool:
    """Whether every line of a list of differences is about one of `parts`."""
    lines = [line.strip() for line in what.splitlines()[1:] if line.strip().startswith("`")]
    return all(line[1:].partition("`")[0].partition(".")[0] in parts for line in lines)


def differences(loaded: Loaded) -> list[str]:
    """What a load that allowed for differences has found, for people."""
    lines = [*loaded.differences]
    if lines:
        matched, left = loaded.num_matched, len(lines)
        lines.append(f"{matched} entries matched, {left} differ and stay as they are")
    lines += loaded.notes
    if loaded.lacking:
        lines.append(
            f"{len(loaded.lacking)} trained parameters are not in {loaded.where}, and stay as they "
            f"are, such as `{loaded.lacking[0]}`"
        )
    return lines


def converted(loaded: Loaded, manifest: Manifest) -> list[str]:
    """What a load has converted, for people."""
    if not loaded.converted:
        return []
    first = loaded.converted[0]
    return [
        f"{len(loaded.converted)} tensors were converted to another dtype, such as `{first}`, "
        f"stored as {manifest.tensors[first].dtype}"
    ]


def other_generators(manifest: Manifest, num_ranks: int) -> str | None:
    """Why a checkpoint does not have a generator state for each rank of this run; None: it has."""
    saved_by = manifest.layout.get("world_size")
    kept = any(entry.path[0] == RNG for entry in manifest.tensors.values())
    if kept and saved_by == num_ranks:
        return None
    return f"saved by {saved_by} ranks, this run has {num_ranks}" if kept else "not saved"
