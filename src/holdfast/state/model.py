"""Models as one tree of parameters, buffers and extra state, by fully qualified name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from holdfast.errors import UsageError
from holdfast.format.structure import Node
from holdfast.state.layout import same_memory
from holdfast.state.match import Match, Values, put_together
from holdfast.state.plain import match_inside
from holdfast.state.stateful import hand_over
from holdfast.state.stored import object_node
from holdfast.state.subclass import UNINITIALIZED, is_ours
from holdfast.state.tree import Flattener, Path, spelled, type_name

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Path elements that `torch.compile` and activation checkpointing add, and no checkpoint has."""

_TRANSPARENT = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
"""Modules that keep another one as `module`, whose names are those of the model alone."""


@cache
def canonical(name: str) -> str:
    """A parameter's name without what `torch.compile` and activation checkpointing add to it.

    >>> canonical("layers.0._checkpoint_wrapped_module.attention.wq.weight")
    'layers.0.attention.wq.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


class Names:
    """Names of a module's state as a checkpoint has them, whatever wraps it, at any depth."""

    def __init__(self, root: nn.Module) -> None:
        self._owners = {
            canonical(name)
            for name, module in root.named_modules(remove_duplicate=False)
            if isinstance(module, _TRANSPARENT)
        }
        self._known: dict[str, str] = {}

    def of(self, raw: str) -> str:
        """The name of what the module's own `state_dict` calls `raw`."""
        if not self._owners:
            return canonical(raw)
        if raw not in self._known:
            self._known[raw] = self._shortened(canonical(raw))
        return self._known[raw]

    def _shortened(self, name: str) -> str:
        kept: list[str] = []
        above = ""
        for part in name.split("."):
            if not (part == "module" and above in self._owners):
                kept.append(part)
            above = f"{above}.{part}" if above else part
        return ".".join(kept)

    def earlier(self, raw: str) -> list[str]:
        """What else a checkpoint may call it: names of stock DCP, and of Holdfast before it looked
        for wrappers inside of modules."""
        name = canonical(raw)
        found = [name, raw]
        if "" in self._owners:
            found.insert(0, name.removeprefix("module."))
        return [one for one in dict.fromkeys(found) if one != self.of(raw)]


def outline_of(parts: Sequence[nn.Module]) -> list[object]:
    """All that decides what the parameters of these modules are called: the same as long as no
    module and no parameter has another place. Every save asks for it, so it makes no names."""
    outline: list[object] = []
    seen: set[int] = set()
    stack: list[nn.Module | None] = [*parts]
    while stack:
        one = stack.pop()
        if one is None or id(one) in seen:
            outline.append(None)
            continue
        seen.add(id(one))
        outline.append(type(one))
        outline += one._parameters.keys()
        outline += map(id, one._parameters.values())
        outline += one._modules.keys()
        stack += one._modules.values()
    return outline


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run that stores its base once has trained, by names of parameters."""

    names: set[str] = field(default_factory=set)
    """Parameters that have required a gradient at a save or load, or came from a checkpoint of the
    run: the base has other values of them."""

    base: set[str] = field(default_factory=set)
    """Parameters that the base has, once it has been loaded."""


class ModelState:
    """One or several parts of a model (pipeline stages) as one component of the state."""

    def __init__(
        self,
        parts: Sequence[nn.Module],
        *,
        trained: Trained | None = None,
        is_base: bool = False,
    ) -> None:
        """`trained`: leave out the parameters that are not in there, which the base of the run has;
        with `is_base`, all is wanted, but the base may lack what is trained.

        Raises:
            UsageError: a part is wrapped by FSDP1, whose parameters are not those of the model.
        """
        self._parts = list(parts)
        self._names: list[Names] = []
        self._named_for: list[object] = []
        self._trained, self._is_base = trained, is_base
        self._without: frozenset[str] = frozenset()
        self._frozen: list[tuple[str, nn.Parameter]] = []
        self.may_lack: frozenset[str] = frozenset()
        """Names that a checkpoint may not have: these stay as they are."""
        for part in parts:
            refuse_fsdp1(part)

    @property
    def parts(self) -> Sequence[nn.Module]:
        """The modules."""
        return self._parts

    def _find_names(self) -> None:
        """Find out what wraps the parts, where any module has another place than before."""
        outline = outline_of(self._parts)
        if not self._names or outline != self._named_for:
            self._names = list(map(Names, self._parts))
            self._named_for = outline

    def _find_trained(self, stored: Collection[str | int] = ()) -> None:
        """Decide what is left out, by what is trained now or ever was in this run; `stored` are
        names that a checkpoint has: these are trained too."""
        if self._trained is None:
            return
        every = {
            names.of(name): parameter
            for part, names in zip(self._parts, self._names, strict=True)
            for name, parameter in part.named_parameters(remove_duplicate=False)
        }
        active = {name for name, one in every.items() if one.requires_grad}
        self._trained.names.update(active)
        if self._is_base:
            self.may_lack = frozenset(active)
            self._trained.base.update(every.keys() & {*stored})
            return
        self._trained.names.update(every.keys() & {*stored})
        self._frozen = [(n, one) for n, one in every.items() if n not in self._trained.names]
        self._without = frozenset(name for name, _ in self._frozen)
        # Frozen when the checkpoint was made, and trained since: as the base has it.
        self.may_lack = frozenset(self._trained.base)

    def note_trained(self) -> None:
        """Remember what is trained now: it may be frozen again before it is saved. Cheap enough for
        every step."""
        for name, one in self._frozen:
            if one.requires_grad and self._trained is not None:
                self._trained.names.add(name)

    def state_dict(self) -> dict[str, Any]:
        """What the parts' own `state_dict` say, by canonical name: parameters and buffers
        themselves, with their gradients."""
        self._find_names()
        self._find_trained()
        state: dict[str, Any] = {}
        for part, names in zip(self._parts, self._names, strict=True):
            for raw, value in own_state(part).items():
                name = names.of(raw)
                if name in state:
                    raise UsageError(
                        f"two parts of the model hold `{name}`, or a wrapper in it does",
                        hint="give each part of the model once",
                    )
                if name not in self._without:
                    state[name] = value
        return state

    def flatten(self, flattener: Flattener, path: Path) -> Node:
        """Add every parameter, buffer and piece of extra state."""
        above = f"{spelled(path)}." if path else ""
        for name, value in self.state_dict().items():
            if type(value) in (torch.Tensor, nn.Parameter):
                flattener.add((*path, name), value, above + name)
            else:
                flattener.put((*path, name), value)
        return None

    def match(self, match: Match, path: Path) -> None:
        """Have parameters and buffers filled where they are; give everything else to the modules'
        own `load_state_dict`."""
        self._find_names()
        self._find_trained([str(name) for name in match.stored.tops()])
        wanted: set[str] = set()
        parts = [
            PartMatch(match, path, part, names, model=self)
            for part, names in zip(self._parts, self._names, strict=True)
        ]
        for part in parts:
            wanted |= part.match()
        for part in parts:
            wanted |= part.match_more(wanted)
            part.finish()

    def skips(self, name: str) -> bool:
        """Whether a name is left out of this model's checkpoints."""
        return name in self._without


class PartMatch:
    """Matches one module with what is stored for it."""

    def __init__(
        self, match: Match, path: Path, part: nn.Module, names: Names, *, model: ModelState
    ) -> None:
        self._match, self._path, self._part, self._names = match, path, part, names
        self._model = model
        self._above = f"{spelled(path)}." if path else ""
        self._state = own_state(part)
        self._replaced: dict[str, Callable[[Values], Any]] = {}

    def match(self) -> set[str]:
        """Say where each entry of the module goes. Returns their names below the path."""
        memory, wanted = memory_of(self._part), set()
        for raw, value in self._state.items():
            if self._model.skips(self._names.of(raw)):
                continue
            name = self._stored_as(raw)
            wanted.add(name)
            own = memory.get(raw)
            if own is not None and _is_memory(value, own):
                self._fill(name, own)
            else:
                self._give(raw, name)
        return wanted

    def match_more(self, wanted: Collection[str]) -> set[str]:
        """Give entries that a fresh module does not have yet to the one that may make room for
        them: it does more at a load than to fill its memory. Returns their names."""
        if not is_custom(self._part):
            return set()
        stored, length = self._match.stored, len(self._path)
        below = stored.below(self._path).children if length else stored.tops()
        customs = [n for n, one in self._part.named_modules() if is_custom(one, deep=False)]
        more = set()
        for name in below:
            text = str(name)
            mine = any(not one or text.startswith(f"{one}.") for one in customs)
            if mine and text not in wanted and not self._belongs_elsewhere(text):
                more.add(text)
                self._give(text, text)
        return more

    def finish(self) -> None:
        """Call the module's own `load_state_dict` once everything has been read, if need be."""
        if self._replaced or is_custom(self._part):
            self._match.then(self._take)

    def _belongs_elsewhere(self, name: str) -> bool:
        return not self._path and name in self._match.others

    def _stored_as(self, raw: str) -> str:
        """The name below the path under which the checkpoint has an entry."""
        name, match = self._names.of(raw), self._match
        if not match.stored.holds(self._above + name, (*self._path, name)):
            for other in self._names.earlier(raw):
                if match.stored.holds(self._above + other, (*self._path, other)):
                    return other
        return name

    def _fill(self, name: str, own: torch.Tensor) -> None:
        match, path = self._match, (*self._path, name)
        if not is_ours(own):
            match_inside(match, own, path, match.stored.below(path), match.stored.node(path))
        elif name in self._model.may_lack and match.stored.tensor(self._above + name) is None:
            match.lacking.append(self._above + name)
        else:
            match.fill(self._above + name, own)

    def _give(self, raw: str, name: str) -> None:
        """Have an entry that is not the module's own memory read, for `load_state_dict`."""
        match, path = self._match, (*self._path, name)
        branch, node = match.stored.below(path), match.stored.node(path)
        if branch.is_empty and node is None:
            if name in self._model.may_lack:
                match.lacking.append(self._above + name)
            else:
                match.missing(self._above + name)
            return
        fresh = self._state.get(raw)
        template = fresh if isinstance(fresh, torch.Tensor) and is_ours(fresh) else None
        match.demand(branch, node, lambda one, _: template if one.path == path else None)
        self._replaced[raw] = lambda values: put_together(branch, object_node(node), values)

    def _take(self, values: Values) -> None:
        """Give the module its state, its own memory in it where that has been filled."""
        state = own_state(self._part)
        for raw, made in self._replaced.items():
            state[raw] = made(values)
        hand_over(self._part, state, spelled(self._path) or "model")


def own_state(module: nn.Module) -> dict[str, Any]:
    """What a module says of itself: parameters and buffers with their gradients, where it can."""
    with torch.no_grad():
        if type(module).state_dict is nn.Module.state_dict:
            # A DTensor takes long to detach; whoever reads or fills it does so with its local one.
            found: dict[str, Any] = module.state_dict(keep_vars=True)
        else:
            found = module.state_dict()
    # Looked at at each save: one pass over the keys.
    if not isinstance(found, Mapping) or not {*map(type, found)} <= {str}:
        name = type(module).__qualname__
        what = f"a {type_name(found)}"
        if isinstance(found, Mapping):
            key = next(key for key in found if type(key) is not str)
            what = f"one with the key {key!r}, a {type_name(key)}"
        raise UsageError(
            f"`state_dict()` of the module {name} has to give a dict with text keys, gave {what}",
            hint="a module with state of another form keeps it by `get_extra_state` and "
            "`set_extra_state`",
        )
    return found


def memory_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by the names that `state_dict` has for them."""
    found: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    found.update(module.named_buffers(remove_duplicate=False))
    return found


def _is_memory(value: Any, own: torch.Tensor) -> bool:
    """Whether an entry of a state dict is the parameter or buffer itself, or shares its memory."""
    if value is own:
        return not isinstance(own, UNINITIALIZED)
    if not isinstance(value, torch.Tensor) or not (is_ours(value) and is_ours(own)):
        return False
    alike = value.dtype == own.dtype and value.shape == own.shape
    return alike and same_memory(value, own)


_HOOKS = (
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
)

_METHODS = (
    *("load_state_dict", "_load_from_state_dict", "state_dict", "_save_to_state_dict"),
    "set_extra_state",
)


def is_custom(module: nn.Module, *, deep: bool = True) -> bool:
    """Whether a module does more at a load than to fill its parameters and buffers; `deep`: or
    any module in it."""
    return any(map(_does_more, module.modules() if deep else [module]))


def _does_more(module: nn.Module) -> bool:
    cls: Any = type(module)
    if _overrides(cls):
        return True
    hooks = (hook for kind in _HOOKS for hook in (getattr(module, kind, None) or {}).values())
    # Torch's own hooks rename and gather; what is filled in place needs neither.
    return any(not _is_torchs(getattr(hook, "hook", hook)) for hook in hooks)


@cache
def _overrides(cls: Any) -> bool:
    return any(
        getattr(cls, name) is not getattr(nn.Module, name) and not _is_torchs(getattr(cls, name))
        for name in _METHODS
    )


def _is_torchs(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").startswith("torch.")


def refuse_fsdp1(module: nn.Module) -> None:
    """Raises UsageError where a module is wrapped by FSDP1."""
    for name, one in module.named_modules():
        cls = type(one)
        if cls.__name__ == "FullyShardedDataParallel" and cls.__module__.startswith(
            "torch.distributed.fsdp"
        ):
            raise UsageError(
                f"`{name or 'the model'}` is wrapped by FullyShardedDataParallel (FSDP1), which "
                "gives and takes its state in a form of its own",
                hint="wrap it with `torch.distributed.fsdp.fully_shard` (FSDP2) instead: "
                "https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html",
            )


def adapted(parts: Sequence[nn.Module]) -> tuple[ModelState, ModelState]:
    """A model that is trained in part: what its checkpoints hold, all but parameters that are
    frozen and always were; and all of it, as its base has it, which may lack what is trained.
    Which these are is found out at each save and load."""
    trained = Trained()
    kept, whole = (ModelState(parts, trained=trained, is_base=is_base) for is_base in (False, True))
    # What is trained from the start may be frozen when it is first saved.
    kept.state_dict()
    return kept, whole


def named_parameters(parts: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter once, under the first of its names."""
    for part in parts:
        names = Names(part)
        for name, parameter in part.named_parameters():
            yield names.of(name), parameter
