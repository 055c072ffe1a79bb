"""Check the arguments of a `CheckpointManager`, before the manager changes its folder or saves."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.arguments import checked_flag, checked_path, flag, number, shown
from holdfast.comm import Ranks, capture, gather_and_run, run_on_all
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

T = TypeVar("T")

logger: logging.Logger = logging.getLogger("holdfast")

Metrics = Mapping[str, float] | Callable[[], Mapping[str, float]]
"""Metrics of a step: numbers by name, or a function that returns them."""


def check(
    ranks: Ranks,
    config: CheckpointConfig,
    *,
    folder: object,
    model: object,
    optimizers: object,
    lr_schedulers: object,
    dataloader: object,
    states: object,
    hub: object,
    store: object,
    on_stop: object,
    on_saved: object,
) -> None:
    """Check the arguments of `CheckpointManager`. If `config.enable` is off, log a warning that
    lists the other changed settings, since they have no effect.

    Collective: every rank calls this. An error on one rank is raised on all.

    Raises:
        UsageError: an argument has the wrong type or value, or a component has the same name as
            another component or as a tensor of the model.
    """

    def check_on_this_rank() -> None:
        _check_place(folder, store)
        if on_stop not in ("raise", "return"):
            raise _wrong("on_stop", '"raise" or "return"', on_stop)
        if on_saved is not None and not callable(on_saved):
            raise _wrong("on_saved", "a function of step, path and metrics", on_saved)
        models = _several("model", model, "a torch.nn.Module", lambda m: isinstance(m, nn.Module))
        if not models:
            raise UsageError("`model` must have at least one module, found an empty list")
        given: list[Any] = [optimizers]
        if not is_container(optimizers):
            given = _several("optimizers", optimizers, "a torch.optim.Optimizer", _is_optimizer)
        schedulers = _several(
            "lr_schedulers",
            lr_schedulers,
            "a scheduler",
            lambda item: _is_stateful(item) and not _is_optimizer(item),
        )
        if dataloader is not None and not _is_stateful(dataloader):
            raise _wrong(
                "dataloader",
                "a loader with `state_dict` and `load_state_dict`",
                dataloader,
                "`torchdata.stateful_dataloader.StatefulDataLoader` has them; without `dataloader` "
                "a resume starts the data afresh",
            )
        if hub is not None and not isinstance(hub, HFModel):
            raise _wrong("hub", "a `HFModel`", hub, "holdfast.hf.export.HFModel(config, assets)")
        for optimizer in given if config.async_mode == "async_with_pinned_mem" else ():
            if not hasattr(optimizer, "register_step_pre_hook"):
                raise UsageError(
                    "with `checkpoint.async_mode` async_with_pinned_mem, optimizers wait before "
                    "each step, which needs `register_step_pre_hook`; "
                    f"{shown(optimizer)} has none",
                    hint='async_mode = "async"',
                )
        # Names that `states` must not use, each with its owner. The names of components that are
        # not passed are free.
        taken = {MODEL: "`model`", RNG: "every step", DATALOADER_KEYS[1]: "`dataloader`"}
        taken |= {OPTIMIZER: "`optimizers`"} if given else {}
        taken |= {SCHEDULER: "`lr_schedulers`"} if schedulers else {}
        taken |= {} if dataloader is None else {DATALOADER: "`dataloader`"}
        _check_names(models, {} if states is None else states, taken)

    run_on_all(ranks, check_on_this_rank)
    changed = [key.name for key in fields(config) if getattr(config, key.name) != key.default]
    if changed and not config.enable and ranks.rank == 0:
        logger.warning(
            "nothing is saved or resumed, since `enable` of the CheckpointConfig is off: without "
            "effect are %s",
            ", ".join(changed),
        )


def _check_place(folder: object, store: object) -> None:
    """Check that only one of `folder` and `store` is given, and that it has the right type."""
    if store is None:
        checked_path(folder, "folder")
    elif folder is not None:
        raise UsageError(
            "`folder` and `store` are both given, and a run saves to one of them",
            hint="CheckpointManager(None, store=store, ...)",
        )
    elif not _has(store, "list", "read", "create", "publish", "remove", "lock", "hold"):
        raise _wrong("store", "a `holdfast.storage.store.Store`", store)


def is_container(optimizers: object) -> bool:
    """Return whether `optimizers` is a single object that holds optimizers, such as TorchTitan's
    `OptimizersContainer`. A checkpoint stores what the object's own `state_dict` returns."""
    if isinstance(optimizers, Sequence) or _is_optimizer(optimizers):
        return False
    # Schedulers and modules have states too, but schedulers lack `zero_grad`, modules lack `step`.
    return _is_stateful(optimizers) and _has(optimizers, "step", "zero_grad")


def _check_names(models: Sequence[nn.Module], states: object, taken: Mapping[str, str]) -> None:
    """Check that `states` holds objects that can be saved, and that no component has the name of
    another component or of a tensor of the model: a checkpoint could not tell the two apart.
    `taken`: names that `states` must not use, each with its owner as error messages call it."""
    tensors = {name for module in models for name in map(Names(module).of, memory_of(module))}
    if both := tensors & {OPTIMIZER, SCHEDULER, RNG, *taken}:
        raise UsageError(
            f"`model` has a tensor `{min(both)}`, which is the name of a component of every "
            "checkpoint",
            hint="give the parameter or buffer another name",
        )
    if not isinstance(states, Mapping):
        raise _wrong("states", "a dict of objects by name", states)
    taken = {**dict.fromkeys(tensors, "a tensor of the model"), **taken}
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


def checked_config(config: object) -> CheckpointConfig:
    """Return the given settings, or for None the defaults, which save every 500 steps. Raise a
    UsageError if `config` has another type."""
    if config is None:
        return CheckpointConfig(enable=True)
    if not isinstance(config, CheckpointConfig):
        keys = "**config" if isinstance(config, Mapping) else "enable=True, ..."
        raise _wrong("config", "a `CheckpointConfig`", config, f"CheckpointConfig({keys})")
    return config


def checked_ranks(ranks: Ranks) -> Ranks:
    """Return `ranks`. Raise a UsageError if the object lacks an attribute or method of `Ranks`."""
    if not _has(ranks, "rank", "size", "gather", "broadcast"):
        hint = "leave it out: the ranks of `torch.distributed` are found"
        raise _wrong("ranks", "ranks as `holdfast.comm` has them", ranks, hint)
    return ranks


def agree(
    ranks: Ranks,
    step: object,
    metrics: object,
    measured: Sequence[float] = (),
    **flags: object,
) -> tuple[int, Sequence[bool], Sequence[float]]:
    """Check the arguments of `CheckpointManager.save` on all ranks. `flags`: its arguments that are
    True or False, by name. Returns `step`, the values of the flags, and the maximum over all ranks
    of each number in `measured`.

    Collective: every rank calls this after every step. It is fast: one `all_reduce_max`.

    Raises:
        UsageError: an argument has the wrong type on some rank, or `step` or a flag is not the same
            on all ranks.
    """

    def check_call() -> list[int]:
        if metrics is not None and not isinstance(metrics, Mapping) and not callable(metrics):
            raise _wrong("metrics", "a dict of numbers, or a function that returns one", metrics)
        checked = [checked_flag(flag, name) for name, flag in flags.items()]
        return [checked_step(step, "step"), *checked]

    call = capture(check_call)
    # The first number says whether this call is invalid. The arguments and their negatives follow:
    # their maxima over all ranks show the largest and the smallest value of each argument.
    num = 1 + len(flags)
    numbers = [1.0, *[-math.inf] * 2 * num]
    if not isinstance(call, HoldfastError):
        numbers = [0.0, *call, *(-number for number in call)]
    numbers = ranks.all_reduce_max([*numbers, *measured])
    if numbers[0] or isinstance(call, HoldfastError):
        call = gather_and_run(ranks, call, lambda calls: calls[0])
    largest, smallest = numbers[1 : 1 + num], [-n for n in numbers[1 + num : 1 + 2 * num]]
    for name, low, high in zip(("step", *flags), smallest, largest, strict=True):
        if low != high:
            found = f"{low:.0f} to {high:.0f}" if name == "step" else "both True and False"
            raise UsageError(f"`{name}` must be the same on every rank, found: {found}")
    return call[0], [bool(flag) for flag in call[1:]], numbers[1 + 2 * num :]


def numbers_in(metrics: Metrics | None) -> dict[str, float]:
    """Return the metrics of a step as plain numbers by name. If `metrics` is a function, call it.
    Raise a UsageError if a name is not text, or a value is not a number."""
    given: object = {} if metrics is None else metrics
    if not isinstance(given, Mapping) and callable(given):
        given = given()
    if not isinstance(given, Mapping):
        raise _wrong("metrics", "a function that returns a dict of numbers", given)
    numbers = {}
    for name, value in given.items():
        if not _is_name(name):
            raise UsageError(f"`metrics` must have text as names, found: {shown(name)}")
        # An array or a tensor with a single element is accepted as a number.
        is_array = hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1
        single = value.item() if is_array else value
        as_number = number(single) if flag(single) is None else float(single)
        if as_number is None:
            raise UsageError(f"`metrics` must have a number as `{name}`, found: {shown(value)}")
        numbers[name] = as_number
    return numbers


def as_list(given: T | Sequence[T]) -> list[T]:
    """Return the items of a sequence as a list. For text or any other object, return a list with
    only this object."""
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        return list(given)
    return [given]


def _several(
    what: str, given: object, expected: str, is_one: Callable[[object], bool]
) -> list[Any]:
    """Return `given`, the value of the argument named `what`, as a list: see `as_list`. Raise a
    UsageError if `is_one` returns False for an item. `expected`: words for the right type in the
    error message."""
    items: list[Any] = as_list(given)
    for item in items:
        if not is_one(item):
            raise _wrong(what, f"{expected}, or a list of them", item, _hint_for(what, item))
    return items


def _is_name(name: object) -> bool:
    """Return whether `name` is a string that is not empty and that UTF-8 can encode."""
    try:
        return isinstance(name, str) and bool(name.encode())
    except UnicodeEncodeError:
        return False


def _has(value: object, *names: str) -> bool:
    """Return whether `value` is an object, not a class, and has all attributes in `names`."""
    return not isinstance(value, type) and all(hasattr(value, name) for name in names)


def _is_stateful(value: object) -> bool:
    names = ("state_dict", "load_state_dict")
    return _has(value, *names) and all(callable(getattr(value, name)) for name in names)


def _is_optimizer(value: object) -> bool:
    attributes = ("param_groups", "state", "state_dict", "load_state_dict")
    return isinstance(value, Optimizer) or _has(value, *attributes)


def _hint_for(what: str, value: object) -> str | None:
    """Return a hint if a wrong `value` of the argument `what` is a frequent mistake, else None."""
    if isinstance(value, type):
        return f"an instance of it: {value.__name__}(...)"
    if isinstance(value, Iterator):
        return f"{what}=list(...)"
    if what == "model":
        module = "the module itself; `holdfast.save(path, {...})` keeps a state dict"
        return module if isinstance(value, Mapping) else None
    if what == "lr_schedulers" and _is_optimizer(value):
        return "pass it as `optimizers`"
    return "leave it out where there is none" if value is None else None


def _wrong(what: str, expected: str, value: object, hint: str | None = None) -> UsageError:
    found = f"the class {value.__name__}" if isinstance(value, type) else shown(value)
    return UsageError(f"`{what}` must be {expected}, found: {found}", hint=hint)
