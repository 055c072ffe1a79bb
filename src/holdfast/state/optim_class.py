"""Check that an optimizer can continue from the state of an optimizer of another class."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from holdfast.format.structure import OPTIMIZERS
from holdfast.state.match import Match
from holdfast.state.tree import Path, dotted, type_name

_OF_SCHEDULERS = frozenset(
    {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "param_names"}
)
"""Options that schedulers or callers add to a group of any optimizer."""


_SLOTS = {
    "torch.optim.adadelta.Adadelta": ("step square_avg acc_delta", ""),
    "torch.optim.adagrad.Adagrad": ("step sum", ""),
    "torch.optim.adam.Adam": ("step exp_avg exp_avg_sq", "max_exp_avg_sq"),
    "torch.optim.adamw.AdamW": ("step exp_avg exp_avg_sq", "max_exp_avg_sq"),
    "torch.optim.adamax.Adamax": ("step exp_avg exp_inf", ""),
    "torch.optim.asgd.ASGD": ("step eta mu ax", ""),
    "torch.optim.nadam.NAdam": ("step mu_product exp_avg exp_avg_sq", ""),
    "torch.optim.radam.RAdam": ("step exp_avg exp_avg_sq", ""),
    "torch.optim.rmsprop.RMSprop": ("step square_avg", "momentum_buffer grad_avg"),
    "torch.optim.rprop.Rprop": ("step prev step_size", ""),
    "torch.optim.sgd.SGD": ("", "momentum_buffer"),
}
"""Slots of torch's own optimizers, by class name: those that every parameter has after a step, and
those that depend on options."""


class ClassCheck:
    """Compares the class of an optimizer with those that saved the state stored at a path."""

    def __init__(self, match: Match, path: Path) -> None:
        self._match, self._name = match, dotted(path)
        node = match.stored.structure.get(path)
        self._stored: list[str] | None = node.get(OPTIMIZERS) if isinstance(node, dict) else None

    def is_same(self, optimizer: Any) -> bool:
        """Return whether the state was saved by an optimizer of this class."""
        here = type_name(optimizer)
        return any(_is_same(here, saved) for saved in self._stored or ())

    def note(self, optimizer: Any) -> None:
        """Note for the log that an optimizer of another class loads the state."""
        if self._stored and not self.is_same(optimizer):
            by, here = ", ".join(dict.fromkeys(self._stored)), type_name(optimizer)
            self._match.notes[f"`{self._name}` was saved by {by}, and is loaded by {here}"] = None

    def check(
        self, optimizer: Any, options: Collection[str], slots: Iterable[Collection[str]]
    ) -> None:
        """Refuse a state from which the optimizer cannot continue. If it can, but another class
        saved the state, note that for the log.

        `options` are the stored options of its groups, `slots` the stored slots of each parameter.
        """
        groups = optimizer.param_groups
        known = {*optimizer.defaults, *(option for group in groups for option in group)}
        beyond = sorted({*options} - known - _OF_SCHEDULERS)
        lacks = sorted({*optimizer.defaults} - {*options}) if options else []
        wrong = _wrong_slots(optimizer, slots)
        # Without a stored class, options alone prove nothing: they also differ between versions of
        # torch.
        unlike = bool(beyond and lacks)
        if not ((unlike or wrong) if self._stored else (unlike and wrong)):
            self.note(optimizer)
            return
        reason = wrong or f"has the options {_listed(beyond)}, and lacks {_listed(lacks)}"
        by = ", ".join(dict.fromkeys(self._stored or ["an optimizer of another class"]))
        here = type_name(optimizer)
        self._match.mismatch(self._name, f"is the state of {by}, not of {here}: it {reason}")


def _wrong_slots(optimizer: Any, slots: Iterable[Collection[str]]) -> str:
    """Describe stored slots that an optimizer of torch cannot use; "" if it can use all."""
    if type_name(optimizer) not in _SLOTS:
        return ""
    needed, optional = ({*names.split()} for names in _SLOTS[type_name(optimizer)])
    for stored in map(set, slots):
        beyond, lacks = stored - needed - optional, needed - stored
        if stored and lacks:
            has = f"has the slots {_listed(sorted(beyond))}, and " if beyond else ""
            return f"{has}lacks the slots {_listed(sorted(lacks))}"
    return ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _is_same(one: str, other: str) -> bool:
    """Return whether two names mean the same class. A class of the script that runs has the module
    `__main__`, so its module is not compared."""
    module, _, name = one.rpartition(".")
    other_module, _, other_name = other.rpartition(".")
    return one == other or (name == other_name and "__main__" in (module, other_module))
