"""Checks the arguments of a `CheckpointManager` before it changes its folder or saves a step."""

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
from holdfast.format.components import (
    DATALOADER,
    DATALOADER_KEYS,
    MODEL,
    OPTIMIZER,
    RNG,
    SCHEDULER,
)
from holdfast.format.names import checked_step
from holdfast.hf.export import HFModel
from holdfast.manager.config import CheckpointConfig
from holdfast.state.model import Names, memory_of

logger: logging.Logger = logging.getLogger("holdfast")

Metrics = Mapping[str, float] | Callable[[], Mapping[str, float]]
"""Numbers by name, or a function that gives them."""

_RANKS = ("rank", "size", "gather", "broadcast")
_OPTIMIZER = ("param_groups", "state", "state_dict", "load_state_dict")


def check(ranks: Ranks, **given: Any) -> None:
    """Check the arguments of `CheckpointManager`: see `check_arguments`.

    Collective: every rank calls this. An error on one rank is raised on all.
    """
    run_on_all(ranks, lambda: check_arguments(**given))
    config: CheckpointConfig = given["config"]
    changed = [key.name for key in fields(config) if getattr(config, key.name) != key.default]
    if changed and not config.enable and ranks.rank == 0:
        logger.warning(
            "nothing is saved or resumed, since `enable` of the CheckpointConfig is off: without "
            "effect are %s",
            ", ".join(changed),
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
    """Check that `CheckpointManager` can save and load these arguments.

    Raises:
        UsageError: an argument of another type, or a name in `states` that is taken.
    """
    checked_path(folder, "folder")
    models = _several("model", model, nn.Module, "a torch.nn.Module")
    for item in models:
        if not isinstance(item, nn.Module):
            expected = "a torch.nn.Module, or a list of them"
            raise _wrong("model", expected, item, _hint_for_model(item))
    if not models:
        raise UsageError("`model` must have at least one module, found an empty list")
    given = _several("optimizers", optimizers, Optimizer, "a torch.optim.Optimizer")
    for item in given:
        _check_optimizer(item, config)
    schedulers = _several("lr_schedulers", lr_schedulers, object, "a scheduler")
    for item in schedulers:
        if isinstance(item, Optimizer) or _has(item, *_OPTIMIZER):
            hint = "pass it as `optimizers`"
            raise _wrong("lr_schedulers", "a scheduler, or a list", item, hint)
        if not _is_stateful(item):
            raise _wrong("lr_schedulers", "a scheduler, or a list", item, _hint_for_none(item))
    if dataloader is not None and not _is_stateful(dataloader):
        raise _wrong(
            "dataloader",
            "a loader with `state_dict` and `load_state_dict`",
            dataloader,
            "`torchdata.stateful_dataloader.StatefulDataLoader` has them; without `dataloader` "
            "a resume starts the data afresh",
        )
    # Owner of each name that is taken. A component that is not passed may be one of `states`.
    taken = {MODEL: "`model`", RNG: "every step", DATALOADER_KEYS[1]: "`dataloader`"}
    taken |= {OPTIMIZER: "`optimizers`"} if given else {}
    taken |= {SCHEDULER: "`lr_schedulers`"} if schedulers else {}
    taken |= {} if dataloader is None else {DATALOADER: "`dataloader`"}
    _check_names(models, {OPTIMIZER, SCHEDULER, RNG, *taken})
    _check_states(states, taken, models)
    if hub is not None and not isinstance(hub, HFModel):
        raise _wrong("hub", "a `HFModel`", hub, "HFModel(config, assets)")


def _check_optimizer(optimizer: object, config: CheckpointConfig) -> None:
    if not isinstance(optimizer, Optimizer) and not _has(optimizer, *_OPTIMIZER):
        expected = "a torch.optim.Optimizer, or a list of them"
        raise _wrong("optimizers", expected, optimizer, _hint_for_none(optimizer))
    has_hook = hasattr(optimizer, "register_step_pre_hook")
    if config.async_mode == "async_with_pinned_mem" and not has_hook:
        raise UsageError(
            "with `checkpoint.async_mode` async_with_pinned_mem, optimizers wait before each step, "
            f"which needs `register_step_pre_hook`; {shown(optimizer)} has none",
            hint='async_mode = "async"',
        )


def checked_config(config: object) -> CheckpointConfig:
    """The given settings, or the default: a save every 500 steps.

    Raises:
        UsageError: `config` is no `CheckpointConfig`.
    """
    if config is None:
        return CheckpointConfig(enable=True)
    if not isinstance(config, CheckpointConfig):
        hint = "CheckpointConfig(enable=True, ...)"
        if isinstance(config, Mapping):
            hint = "CheckpointConfig(**config)"
        raise _wrong("config", "a `CheckpointConfig`", config, hint)
    return config


def checked_ranks(ranks: Ranks) -> Ranks:
    """The given ranks.

    Raises:
        UsageError: an object that lacks a method of `Ranks`.
    """
    if not _has(ranks, *_RANKS):
        hint = "leave it out: the ranks of `torch.distributed` are found"
        raise _wrong("ranks", "ranks as `holdfast.comm` has them", ranks, hint)
    return ranks


Call = tuple[int, bool]
"""Step and `last_step` of a call of `save`."""


def call_of(step: object, last_step: object, metrics: object) -> Call | HoldfastError:
    """Check the arguments of `save`. Returns the error instead of raising it, since `agreed` raises
    it on all ranks."""
    try:
        call = checked_step(step, "step"), checked_flag(last_step, "last_step")
        if metrics is not None and not isinstance(metrics, Mapping) and not callable(metrics):
            raise _wrong("metrics", "a dict of numbers, or a function that returns one", metrics)
    except HoldfastError as error:
        return error
    return call


def encoded(call: Call | HoldfastError) -> list[float]:
    """This rank's call of `save` as numbers, of which the ranks take the maximum.

    The first tells whether its arguments are invalid. Then come the arguments and their negatives,
    whose maximum gives their minimum.
    """
    if isinstance(call, HoldfastError):
        return [1.0, *[-math.inf] * 4]
    step, last_step = call
    return [0.0, step, -step, last_step, -last_step]


def agreed(
    ranks: Ranks, call: Call | HoldfastError, numbers: Sequence[float]
) -> tuple[int, bool, Sequence[float]]:
    """The call of `save` that all ranks make, and the numbers that follow its encoding.

    `numbers` begins with the maximum of `encoded` over all ranks. Collective: every rank calls
    this. If any rank's arguments are invalid, all raise its error.

    Raises:
        UsageError: the arguments differ between ranks.
    """
    invalid, step_max, step_min_negated, last_max, last_min_negated, *rest = numbers
    if invalid:
        gather_and_run(ranks, call if isinstance(call, HoldfastError) else None, lambda _: None)
    if step_max != -step_min_negated:
        found = f"{-step_min_negated:.0f} to {step_max:.0f}"
        raise UsageError(f"`step` must be the same on every rank, found: {found}")
    if last_max != -last_min_negated:
        raise UsageError("`last_step` must be the same on every rank, found: both True and False")
    assert not isinstance(call, HoldfastError)
    return *call, rest


def numbers_in(metrics: Metrics | None) -> dict[str, float]:
    """The metrics of a step as plain numbers.

    Raises:
        UsageError: a name is no text, or a value is no number.
    """
    given: object = {} if metrics is None else metrics
    if not isinstance(given, Mapping) and callable(given):
        given = given()
    if not isinstance(given, Mapping):
        raise _wrong("metrics", "a function that returns a dict of numbers", given)
    numbers = {}
    for name, value in given.items():
        if not _is_name(name):
            raise UsageError(f"`metrics` must have text as names, found: {shown(name)}")
        single = value.item() if _is_element(value) else value
        as_number = number(single) if flag(single) is None else float(single)
        if as_number is None:
            raise UsageError(f"`metrics` must have a number as `{name}`, found: {shown(value)}")
        numbers[name] = as_number
    return numbers


def _check_names(models: Sequence[nn.Module], components: Collection[str]) -> None:
    """Refuse tensors of the model with the name of a component, which a checkpoint could not tell
    apart."""
    both = {*_names_in(models)} & {*components}
    if both:
        raise UsageError(
            f"`model` has a tensor `{min(both)}`, which is the name of a component of every "
            "checkpoint",
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
    for module in models:
        yield from map(Names(module).of, memory_of(module))


def _several(what: str, given: object, kind: type, expected: str) -> list[Any]:
    """One object or several, as a list."""
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        return list(given)
    if isinstance(given, Iterator) and not isinstance(given, kind):
        raise _wrong(what, f"{expected}, or a list of them", given, f"{what}=list(...)")
    return [given]


def _is_name(name: object) -> bool:
    """Whether this is a text, not empty, that UTF-8 can encode."""
    try:
        return isinstance(name, str) and bool(name.encode())
    except UnicodeEncodeError:
        return False


def _has(value: object, *names: str) -> bool:
    """Whether this is an object, not a class, with all of these attributes."""
    return not isinstance(value, type) and all(hasattr(value, name) for name in names)


def _is_stateful(value: object) -> bool:
    names = ("state_dict", "load_state_dict")
    return _has(value, *names) and all(callable(getattr(value, name)) for name in names)


def _is_element(value: object) -> bool:
    """Whether this is an array or a tensor of one element."""
    shape = getattr(value, "shape", None)
    return shape is not None and hasattr(value, "item") and math.prod(shape) == 1


def _hint_for_model(value: object) -> str | None:
    if isinstance(value, type):
        return f"an instance of it: {value.__name__}(...)"
    if isinstance(value, Mapping):
        return "the module itself; `holdfast.save(path, {...})` keeps a state dict"
    return None


def _hint_for_none(value: object) -> str | None:
    return "leave it out where there is none" if value is None else None


def _wrong(what: str, expected: str, value: object, hint: str | None = None) -> UsageError:
    found = f"the class {value.__name__}" if isinstance(value, type) else shown(value)
    return UsageError(f"`{what}` must be {expected}, found: {found}", hint=hint)
