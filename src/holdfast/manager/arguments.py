"""The arguments of a `CheckpointManager`, checked before it touches its folder or saves a step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.arguments import checked_flag, checked_path, flag, number, shown
from holdfast.comm import Ranks, gather_and_run, run_on_all
from holdfast.errors import HoldfastError, UsageError
from holdfast.format.names import checked_step
from holdfast.hf.export import HFModel
from holdfast.manager.config import DATALOADER_KEYS, CheckpointConfig
from holdfast.manager.parts import DATALOADER, MODEL, OPTIMIZER, RNG, SCHEDULER
from holdfast.state.model import Names, memory_of

logger: logging.Logger = logging.getLogger("holdfast")

Metrics = Mapping[str, float] | Callable[[], Mapping[str, float]]
"""Numbers by name, or a function that gives them."""

_RANKS = ("rank", "size", "gather", "broadcast")
_OPTIMIZER = ("param_groups", "state", "state_dict", "load_state_dict")


def check(ranks: Ranks, **given: Any) -> None:
    """Refuse what `CheckpointManager` cannot keep, by the arguments of `check_arguments`.

    Collective: every rank calls this; an error on one is raised on all.
    """
    run_on_all(ranks, lambda: check_arguments(**given))
    idle = _without_effect(given["config"])
    if idle and ranks.rank == 0:
        logger.warning(
            "nothing is saved or resumed, since `enable` of the CheckpointConfig is off: without "
            "effect are %s",
            ", ".join(idle),
        )


def check_arguments(
    *,
    folder: object,
    model: object,
    optimizers: object,
    lr_schedulers: object,
    dataloader: object,
    states: object,
    hub: object,
    config: CheckpointConfig,
) -> None:
    """Refuse what `CheckpointManager` cannot keep.

    Raises:
        UsageError: an argument of another type, or a name in `states` that is taken.
    """
    checked_path(folder, "folder")
    models = _several("model", model, nn.Module, "a torch.nn.Module")
    for one in models:
        if not isinstance(one, nn.Module):
            raise _wrong(
                "model", "a torch.nn.Module, or a list of them", one, _advice_on_model(one)
            )
    if not models:
        raise UsageError("`model` must have at least one module, found an empty list")
    given = _several("optimizers", optimizers, Optimizer, "a torch.optim.Optimizer")
    for one in given:
        if not isinstance(one, Optimizer) and not _has(one, *_OPTIMIZER):
            expected = "a torch.optim.Optimizer, or a list of them"
            raise _wrong("optimizers", expected, one, _advice_on_none(one))
        hooked = hasattr(one, "register_step_pre_hook")
        if config.async_mode == "async_with_pinned_mem" and not hooked:
            raise UsageError(
                f"`checkpoint.async_mode` async_with_pinned_mem waits in each optimizer before it "
                f"steps, which {shown(one)} has no hook for",
                hint='async_mode = "async"',
            )
    schedulers = _several("lr_schedulers", lr_schedulers, object, "a scheduler")
    for one in schedulers:
        if isinstance(one, Optimizer) or _has(one, *_OPTIMIZER):
            hint = "pass it as `optimizers`"
            raise _wrong("lr_schedulers", "a scheduler, or a list", one, hint)
        if not _is_stateful(one):
            raise _wrong("lr_schedulers", "a scheduler, or a list", one, _advice_on_none(one))
    if dataloader is not None and not _is_stateful(dataloader):
        raise _wrong(
            "dataloader",
            "a loader with `state_dict` and `load_state_dict`",
            dataloader,
            "`torchdata.stateful_dataloader.StatefulDataLoader` has them; without `dataloader` "
            "a resume starts the data afresh",
        )
    # Names of parts to the argument that gives them; a part that nobody gives may be a state.
    taken = {MODEL: "`model`", RNG: "every step", DATALOADER_KEYS[1]: "`dataloader`"}
    taken |= {OPTIMIZER: "`optimizers`"} if given else {}
    taken |= {SCHEDULER: "`lr_schedulers`"} if schedulers else {}
    taken |= {} if dataloader is None else {DATALOADER: "`dataloader`"}
    _check_names(models, {OPTIMIZER, SCHEDULER, RNG, *taken})
    _check_states(states, taken, models)
    if hub is not None and not isinstance(hub, HFModel):
        raise _wrong("hub", "a `HFModel`", hub, "HFModel(config, assets)")


def _without_effect(config: CheckpointConfig) -> list[str]:
    """The settings that somebody has changed where `enable`, without which none counts, is off."""
    if config.enable:
        return []
    return [one.name for one in fields(config) if getattr(config, one.name) != one.default]


def checked_config(config: object) -> CheckpointConfig:
    """The settings of a manager: those given, else saving every 500 steps.

    Raises:
        UsageError: something else was given.
    """
    if config is None:
        return CheckpointConfig(enable=True)
    if not isinstance(config, CheckpointConfig):
        named = isinstance(config, Mapping)
        hint = "CheckpointConfig(**config)" if named else "CheckpointConfig(enable=True, ...)"
        raise _wrong("config", "a `CheckpointConfig`", config, hint)
    return config


def checked_ranks(ranks: Ranks) -> Ranks:
    """The ranks that were given.

    Raises:
        UsageError: something else was given.
    """
    if not _has(ranks, *_RANKS):
        hint = "leave it out: the ranks of `torch.distributed` are found"
        raise _wrong("ranks", "ranks as `holdfast.comm` has them", ranks, hint)
    return ranks


Call = tuple[int, bool]
"""Step and `last_step` of a call of `save`."""


def call_of(step: object, last_step: object, metrics: object) -> Call | HoldfastError:
    """What `save` is called with; or, to be told to all ranks, the error that refuses it: no step,
    no flag, or neither numbers by name nor a function."""
    try:
        checked = checked_step(step, "step"), checked_flag(last_step, "last_step")
        if metrics is not None and not isinstance(metrics, Mapping) and not callable(metrics):
            raise _wrong("metrics", "a dict of numbers, or a function that returns one", metrics)
    except HoldfastError as error:
        return error
    return checked


def told_of(call: Call | HoldfastError) -> list[float]:
    """What other ranks are told of this rank's call of `save`, to take the largest of: whether it
    was refused, and its arguments with their negatives, which shows the least of them too."""
    if isinstance(call, HoldfastError):
        return [1.0, *[-math.inf] * 4]
    step, last_step = call
    return [0.0, step, -step, last_step, -last_step]


def agreed(
    ranks: Ranks, call: Call | HoldfastError, told: Sequence[float]
) -> tuple[int, bool, Sequence[float]]:
    """The call of `save` that every rank makes alike. `told` begins with the largest numbers of
    every rank's `told_of`; what follows them is returned too.

    Collective: every rank calls this; where any rank's call was refused, all raise its error.

    Raises:
        UsageError: ranks save different steps, which could not be told from one another.
    """
    refused, most, minus_least, last, minus_not_last, *rest = told
    if refused:
        gather_and_run(ranks, call if isinstance(call, HoldfastError) else None, lambda _: None)
    if most != -minus_least:
        found = f"{-minus_least:.0f} to {most:.0f}"
        raise UsageError(f"`step` must be the same on every rank, found: {found}")
    if last != -minus_not_last:
        raise UsageError("`last_step` must be the same on every rank, found: both True and False")
    assert not isinstance(call, HoldfastError)
    return *call, rest


def numbers_in(metrics: Metrics | None) -> dict[str, float]:
    """What a step is to keep of what was measured.

    Raises:
        UsageError: a name that is no text, or a value that is no number.
    """
    given: object = {} if metrics is None else metrics
    if not isinstance(given, Mapping) and callable(given):
        given = given()
    if not isinstance(given, Mapping):
        raise _wrong("metrics", "a function that returns a dict of numbers", given)
    found = {}
    for name, value in given.items():
        if not _is_name(name):
            raise UsageError(f"`metrics` must have text as names, found: {shown(name)}")
        single = value.item() if _is_element(value) else value
        number_of = number(single) if flag(single) is None else float(single)
        if number_of is None:
            raise UsageError(f"`metrics` must have a number as `{name}`, found: {shown(value)}")
        found[name] = number_of
    return found


def _check_names(models: Sequence[nn.Module], parts: Collection[str]) -> None:
    """Refuse a model that has a tensor of the name of a part: a step could not tell them apart."""
    both = {*_names_in(models)} & {*parts}
    if both:
        raise UsageError(
            f"`model` has a tensor `{min(both)}`, which is the name of a part of every step",
            hint="give the parameter or buffer another name",
        )


def _check_states(states: object, taken: Mapping[str, str], models: Sequence[nn.Module]) -> None:
    if states is None:
        return
    if not isinstance(states, Mapping):
        raise _wrong("states", "a dict of objects by name", states)
    taken = {**dict.fromkeys(_names_in(models), "a tensor of the model"), **taken}
    for name, value in states.items():
        if not _is_name(name):
            raise UsageError(f"`states` must have text as names, found: {shown(name)}")
        if name in taken:
            raise UsageError(
                f"`states` must have names of its own, found: `{name}`, which {taken[name]} has",
                hint=f"another name, such as `my_{name}`",
            )
        if not _is_stateful(value) and not isinstance(value, dict | Tensor):
            raise _wrong(
                f"states[{name!r}]",
                "an object with `state_dict` and `load_state_dict`, a dict or a tensor",
                value,
                "put plain values into a dict, which `load` fills in place",
            )


def _names_in(models: Sequence[nn.Module]) -> Iterator[str]:
    for one in models:
        yield from map(Names(one).of, memory_of(one))


def _several(what: str, given: object, kind: type, expected: str) -> list[Any]:
    """One object or several, as a list."""
    if isinstance(given, list | tuple) or (isinstance(given, Sequence) and not _is_text(given)):
        return list(given)
    if isinstance(given, Iterator) and not isinstance(given, kind):
        raise _wrong(what, f"{expected}, or a list of them", given, f"{what}=list(...)")
    return [given]


def _is_name(name: object) -> bool:
    """Whether this is text that the index of a checkpoint can hold."""
    try:
        return isinstance(name, str) and bool(name.encode())
    except UnicodeEncodeError:
        return False


def _is_text(value: object) -> bool:
    return isinstance(value, str | bytes)


def _has(value: object, *names: str) -> bool:
    """Whether an object, which is no class, has all of these."""
    return not isinstance(value, type) and all(hasattr(value, name) for name in names)


def _is_stateful(value: object) -> bool:
    found = _has(value, "state_dict", "load_state_dict")
    return found and callable(value.state_dict) and callable(value.load_state_dict)  # type: ignore[attr-defined]


def _is_element(value: object) -> bool:
    """Whether this is an array or a tensor of one element, whatever its dims."""
    shape = getattr(value, "shape", None)
    return shape is not None and hasattr(value, "item") and math.prod(shape) == 1


def _advice_on_model(value: object) -> str | None:
    if isinstance(value, type):
        return f"an instance of it: {value.__name__}(...)"
    if isinstance(value, Mapping):
        return "the module itself; `holdfast.save(path, {...})` keeps a state dict"
    return None


def _advice_on_none(value: object) -> str | None:
    return "leave it out where there is none" if value is None else None


def _wrong(what: str, expected: str, value: object, hint: str | None = None) -> UsageError:
    found = f"the class {value.__name__}" if isinstance(value, type) else shown(value)
    return UsageError(f"`{what}` must be {expected}, found: {found}", hint=hint)
