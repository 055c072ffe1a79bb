"""The components of a training state: which of them to load, and messages about them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from holdfast.arguments import nearest
from holdfast.errors import HoldfastError, MismatchError, UsageError
from holdfast.format.components import COMPONENTS, DATALOADER, DATALOADER_KEYS, MODEL, RNG
from holdfast.format.manifest import Manifest
from holdfast.loading.load import Loaded
from holdfast.state.rng import RngState
from holdfast.state.stateful import RANK, ObjectState, RankState
from holdfast.state.tree import Stateful


def components_per_rank(dataloader: Stateful | None, rank: int) -> dict[str, Any]:
    """Return the components whose state may differ between ranks: the data loader, if there is one,
    and the random number generators. `rank`: number of this rank.

    The generators come last, since loading the data loader may create an iterator or a worker,
    which draws random numbers.
    """
    loader = {} if dataloader is None else {DATALOADER: _loader_component(dataloader, rank)}
    return {**loader, RNG: RankState(ObjectState(RngState()), rank, may_lack=True)}


def ignored_names(
    manifest: Manifest, loaded: Sequence[str], excluded: Collection[str] = ()
) -> set[str]:
    """Return the top-level keys of a checkpoint that a load of the components `loaded` ignores:
    those in `excluded`, and if only the model is loaded, the keys of all other components too."""
    names = canonical(excluded)
    if [*loaded] == [MODEL]:
        names |= {*(COMPONENTS if manifest.components is None else manifest.components)}
    return names


def canonical(names: Collection[str]) -> set[str]:
    """Return the names of components. Replace `data_loader`, another spelling, by `dataloader`."""
    return {DATALOADER if name in DATALOADER_KEYS else name for name in names}


def check_excluded(excluded: Sequence[str], components: Collection[str]) -> None:
    """Raise a UsageError if a name in `excluded` is not a component, or is the model."""
    known = {*components, *DATALOADER_KEYS} - {MODEL}
    for name in excluded:
        if name not in known:
            raise UsageError(
                f"`checkpoint.exclude_from_loading` has `{name}`, which is no component of the "
                "training state",
                hint=nearest(name, known) or f"components: {', '.join(sorted(known))}",
            )


def _loader_component(loader: Stateful, rank: int) -> ObjectState | RankState:
    """Return the component that saves and loads the state of a data loader.

    A loader with `state_is_global = True` has a state that is valid on all ranks, such as a
    position in a global order of samples. This state is saved once, and any number of ranks can
    load it. Otherwise each rank saves its own state, and a load needs the same number of ranks.
    """
    # torchdata's loader creates its iterator in `state_dict`, and this draws a seed. So a load must
    # call `state_dict` too, before the random number generators are restored.
    state = ObjectState(loader, is_read_back=True)
    return state if getattr(loader, "state_is_global", False) else RankState(state, rank)


def check_dataloader(manifest: Manifest, num_ranks: int) -> None:
    """If a checkpoint has one state of the data loader for each rank, check that these are the
    states of `num_ranks` ranks. Raise a MismatchError otherwise."""
    paths = [tensor.path for tensor in manifest.tensors.values()]
    paths += [value.path for value in manifest.values.values()]
    keys = {str(path[1]) for path in paths if path[0] == DATALOADER and len(path) > 1}
    by_rank = {key for key in keys if key.startswith(RANK)}
    if by_rank and by_rank != {f"{RANK}{rank}" for rank in range(num_ranks)}:
        raise MismatchError(
            f"the data loader's state was saved by {len(by_rank)} ranks, one state for each; "
            f"this run has {num_ranks}",
            hint="`holdfast.data.ElasticLoader`, or a loader with `state_is_global = True`, saves "
            "one state for any number of ranks; "
            '`checkpoint.exclude_from_loading = ["dataloader"]` starts the data afresh',
        )


def hint_for_mismatch(error: HoldfastError, components: Collection[str]) -> str | None:
    """Return a hint for the error of a load. The hint names the setting that excludes the
    components which do not match the checkpoint. Return None if only the model does not match.
    `components`: names of all components but the model."""
    named = {name.partition(".")[0] for name in re.findall(r"`([^`/]+)`", error.what)}
    mismatched = sorted(named & {*components})
    if not mismatched:
        return None
    # After its first line, the message lists the differences. Each line begins with a name.
    lines = [line.strip() for line in error.what.splitlines()[1:]]
    first_names = {line.split("`")[1].partition(".")[0] for line in lines if line[:1] == "`"}
    if first_names <= {*components}:
        return (
            "the model fits; the rest was saved by another program, or with other settings: "
            f"`--checkpoint.exclude_from_loading {','.join(mismatched)}` starts it afresh"
        )
    return (
        "is it a checkpoint of another model? `--checkpoint.exclude_from_loading` leaves out "
        f"whole components, such as {', '.join(mismatched)}"
    )


def differences(loaded: Loaded) -> list[str]:
    """Return log lines about differences between checkpoint and run that a load has tolerated."""
    lines = [*loaded.differences]
    if lines:
        lines.append(
            f"{loaded.num_matched} entries matched, {len(lines)} differ and stay as they are"
        )
    lines += loaded.notes
    if loaded.lacking:
        lines.append(
            f"{len(loaded.lacking)} trained parameters are not in {loaded.where}, and stay as they "
            f"are, such as `{loaded.lacking[0]}`"
        )
    return lines


def conversions(loaded: Loaded, manifest: Manifest) -> list[str]:
    """Return a list with one log line if a load has converted tensors to another dtype, else []."""
    if not loaded.converted:
        return []
    first = loaded.converted[0]
    return [
        f"{len(loaded.converted)} tensors were converted to another dtype, such as `{first}`, "
        f"stored as {manifest.tensors[first].dtype}"
    ]


def why_no_generators(manifest: Manifest, num_ranks: int) -> str | None:
    """Return why a run of `num_ranks` ranks cannot load the states of the random number generators
    from a checkpoint; None if it can."""
    saved_by = manifest.layout.get("world_size")
    if not any(entry.path[0] == RNG for entry in manifest.tensors.values()):
        return "not saved"
    if saved_by == num_ranks:
        return None
    return f"saved by {saved_by} ranks, this run has {num_ranks}"
