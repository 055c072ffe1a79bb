"""Classes of optimizers: which one wrote a state, and whether another one can go on from it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from holdfast.format.structure import OPTIMIZERS
from holdfast.state.match import Match
from holdfast.state.tree import Path, spelled, type_name

_OF_SCHEDULERS = frozenset(
    {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "param_names"}
)
"""Options that schedulers and callers add to a group, whatever its optimizer is."""


class _Slots(NamedTuple):
    needed: frozenset[str]
    """Slots of every parameter that has been stepped."""

    more: frozenset[str] = frozenset()
    """Slots that some options add."""


def _slots(needed: str, more: str = "") -> _Slots:
    return _Slots(frozenset(needed.split()), frozenset(more.split()))


_SLOTS = {
    "torch.optim.adadelta.Adadelta": _slots("step square_avg acc_delta"),
    "torch.optim.adagrad.Adagrad": _slots("step sum"),
    "torch.optim.adam.Adam": _slots("step exp_avg exp_avg_sq", "max_exp_avg_sq"),
    "torch.optim.adamw.AdamW": _slots("step exp_avg exp_avg_sq", "max_exp_avg_sq"),
    "torch.optim.adamax.Adamax": _slots("step exp_avg exp_inf"),
    "torch.optim.asgd.ASGD": _slots("step eta mu ax"),
    "torch.optim.nadam.NAdam": _slots("step mu_product exp_avg exp_avg_sq"),
    "torch.optim.radam.RAdam": _slots("step exp_avg exp_avg_sq"),
    "torch.optim.rmsprop.RMSprop": _slots("step square_avg", "momentum_buffer grad_avg"),
    "torch.optim.rprop.Rprop": _slots("step prev step_size"),
    "torch.optim.sgd.SGD": _slots("", "momentum_buffer"),
}
"""Slots of torch's own optimizers, by class."""


class ClassCheck:
    """Compares live optimizers with those that wrote what is stored at a path."""

    def __init__(self, match: Match, path: Path) -> None:
        self._match, self._name = match, spelled(path)
        node = match.stored.structure.get(path)
        self._stored: list[str] | None = node.get(OPTIMIZERS) if isinstance(node, dict) else None

    def is_same(self, optimizer: Any) -> bool:
        """Whether an optimizer of this class is known to have written the state."""
        here = type_name(optimizer)
        return any(_is_same(here, one) for one in self._stored or ())

    def note(self, optimizer: Any) -> None:
        """Have it said that an optimizer of another class takes the state."""
        if self._stored and not self.is_same(optimizer):
            by, here = ", ".join(dict.fromkeys(self._stored)), type_name(optimizer)
            self._match.notes[f"`{self._name}` was saved by {by}, and is loaded by {here}"] = None

    def check(
        self, optimizer: Any, options: Collection[str], slots: Iterable[Collection[str]]
    ) -> None:
        """Refuse what an optimizer of another class, or of one that nobody knows, cannot go on
        from; else have it said. `options` are those that are stored for its groups, `slots` those
        of each parameter."""
        groups = optimizer.param_groups
        known = {*optimizer.defaults, *(option for group in groups for option in group)}
        beyond = sorted({*options} - known - _OF_SCHEDULERS)
        lacks = sorted({*optimizer.defaults} - {*options}) if options else []
        wrong = _wrong_slots(optimizer, slots)
        # Where nobody knows the class, a version of torch may have had other options.
        unlike = bool(beyond and lacks)
        if not ((unlike or wrong) if self._stored else (unlike and wrong)):
            self.note(optimizer)
            return
        reason = wrong or f"has the options {_listed(beyond)} there, and lacks {_listed(lacks)}"
        by = ", ".join(dict.fromkeys(self._stored or ["an optimizer of another class"]))
        here = type_name(optimizer)
        self._match.mismatch(self._name, f"is the state of {by}, not of {here}: it {reason}")


def _wrong_slots(optimizer: Any, slots: Iterable[Collection[str]]) -> str:
    """What an optimizer of torch's own cannot take of the slots that are stored."""
    table = _SLOTS.get(type_name(optimizer))
    if table is None:
        return ""
    for held in map(frozenset, slots):
        beyond = held - table.needed - table.more
        lacks = table.needed - held
        if held and beyond and lacks:
            return (
                f"has the slots {_listed(sorted(beyond))} there, and lacks {_listed(sorted(lacks))}"
            )
        if held and lacks:
            return f"lacks the slots {_listed(sorted(lacks))}"
    return ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _is_same(one: str, other: str) -> bool:
    """Whether two names are of one class; a script's own is in `__main__` where it is run."""
    (module, _, name), (theirs, _, their_name) = one.rpartition("."), other.rpartition(".")
    return one == other or (name == their_name and "__main__" in (module, theirs))
