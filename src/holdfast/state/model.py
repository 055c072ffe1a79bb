"""The state of models: parameters, buffers and extra state by fully qualified name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from holdfast.errors import UsageError
from holdfast.format.components import WRAPPERS
from holdfast.format.structure import Node
from holdfast.state.layout import same_memory
from holdfast.state.match import SHARES_MEMORY, Match
from holdfast.state.plain import match_inside
from holdfast.state.stateful import hand_over
from holdfast.state.stored import Values
from holdfast.state.strides import overlaps_itself
from holdfast.state.subclass import UNINITIALIZED, is_plain_tensor
from holdfast.state.tree import Flattener, Path, dotted, type_name

_TRANSPARENT = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
"""Wrappers that hold the model as `module`. Checkpoints leave out this path element."""


@cache
def canonical(name: str) -> str:
    """Return a parameter's name without path elements of `torch.compile` and activation
    checkpointing.

    >>> canonical("layers.0._checkpoint_wrapped_module.attention.wq.weight")
    'layers.0.attention.wq.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


class Names:
    """Maps the names in a module's `state_dict` to those in the checkpoint, which are the names in
    the unwrapped model."""

    def __init__(self, root: nn.Module) -> None:
        self._owners = {
            canonical(name)
            for name, module in root.named_modules(remove_duplicate=False)
            if isinstance(module, _TRANSPARENT)
        }
        self._known: dict[str, str] = {}

    def of(self, raw: str) -> str:
        """Return the checkpoint's name for the entry `raw` of the module's `state_dict`."""
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
        """Return other names that a checkpoint may have for `raw`: from stock DCP, or from old
        versions of Holdfast, which kept the path elements of nested wrappers."""
        name = canonical(raw)
        others = [name, raw]
        if "" in self._owners:
            others.insert(0, name.removeprefix("module."))
        return [other for other in dict.fromkeys(others) if other != self.of(raw)]


def outline_of(parts: Sequence[nn.Module]) -> list[object]:
    """Return a list that differs once any module or parameter is added, removed or replaced.

    Comparing it at every save takes less time than computing all names again.
    """
    outline: list[object] = []
    visited: set[int] = set()
    stack: list[nn.Module | None] = [*parts]
    while stack:
        module = stack.pop()
        if module is None or id(module) in visited:
            outline.append(None)
            continue
        visited.add(id(module))
        outline.append(type(module))
        outline += module._parameters.keys()
        outline += map(id, module._parameters.values())
        outline += module._modules.keys()
        stack += module._modules.values()
    return outline


@dataclass(frozen=True, slots=True)
class Trained:
    """Parameter names of a run whose checkpoints leave out parameters that it never trained."""

    names: set[str] = field(default_factory=set)
    """Parameters whose values may differ from the base model's: those that required a gradient at
    a save or load, or that a checkpoint of the run contains."""

    base: set[str] = field(default_factory=set)
    """Parameters in the base model; empty until it has been loaded."""


class ModelState:
    """One model, or the parts of one (pipeline stages), as a component of the state."""

    def __init__(
        self,
        parts: Sequence[nn.Module],
        *,
        trained: Trained | None = None,
        is_base: bool = False,
    ) -> None:
        """`trained`: save only the trained parameters; the base model has the others. `is_base`:
        this is the base model, which may lack trained parameters."""
        self.parts: Sequence[nn.Module] = list(parts)
        self._names: list[Names] = []
        self._named_for: list[object] = []
        self._trained, self._is_base = trained, is_base
        self._left_out: dict[str, nn.Parameter] = {}
        self.may_lack: frozenset[str] = frozenset()
        """Names that a checkpoint may lack. Their tensors then keep their values."""
        for part in parts:
            refuse_fsdp1(part)

    def _find_names(self) -> None:
        """Compute the names again if a module or parameter was added, removed or replaced."""
        outline = outline_of(self.parts)
        if not self._names or outline != self._named_for:
            self._names = list(map(Names, self.parts))
            self._named_for = outline

    def _find_trained(self, stored: Collection[str | int] = ()) -> None:
        """Decide which parameters checkpoints leave out: those that this run never trained. Names
        in a checkpoint of the run, `stored`, count as trained."""
        if self._trained is None:
            return
        parameters = {
            names.of(name): parameter
            for part, names in zip(self.parts, self._names, strict=True)
            for name, parameter in part.named_parameters(remove_duplicate=False)
        }
        active = {name for name, parameter in parameters.items() if parameter.requires_grad}
        self._trained.names.update(active)
        if self._is_base:
            self.may_lack = frozenset(active)
            self._trained.base.update(parameters.keys() & {*stored})
            return
        self._trained.names.update(parameters.keys() & {*stored})
        self._left_out = {n: p for n, p in parameters.items() if n not in self._trained.names}
        # A parameter frozen at the save and trained now is not in the checkpoint: it keeps the
        # base model's value.
        self.may_lack = frozenset(self._trained.base)

    def note_trained(self) -> None:
        """Record which parameters are trained now. Every step calls this, because a parameter may
        be frozen again before the next save."""
        for name, parameter in self._left_out.items():
            if parameter.requires_grad and self._trained is not None:
                self._trained.names.add(name)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all parts by canonical name: the parameters and buffers themselves,
        not detached."""
        self._find_names()
        self._find_trained()
        state: dict[str, Any] = {}
        for part, names in zip(self.parts, self._names, strict=True):
            for raw, value in own_state(part).items():
                name = names.of(raw)
                if name in state:
                    raise UsageError(
                        f"two entries of the model have the name `{name}`",
                        hint="pass each part once; names must differ in more than wrappers",
                    )
                if name not in self._left_out:
                    state[name] = value
        return state

    def flatten(self, flattener: Flattener, path: Path) -> Node:
        """Add every parameter, buffer and extra state, below `path`."""
        above = f"{dotted(path)}." if path else ""
        if path:
            flattener.state.unions[path] = "model"
        for name, value in self.state_dict().items():
            if type(value) in (torch.Tensor, nn.Parameter):
                if overlaps_itself(value):
                    raise UsageError(
                        f"`{above}{name}` {SHARES_MEMORY}; a resume could not fill it",
                        hint="register a copy with memory of its own: `tensor.clone()`",
                    )
                flattener.add((*path, name), value, above + name)
            else:
                flattener.put((*path, name), value)
        return None

    def match(self, match: Match, path: Path) -> None:
        """Plan to fill parameters and buffers in place, and to pass everything else to the
        modules' own `load_state_dict`."""
        self._find_names()
        self._find_trained([str(name) for name in match.stored.root.children])
        wanted: set[str] = set()
        parts = [
            ModuleMatch(match, path, part, names, model=self)
            for part, names in zip(self.parts, self._names, strict=True)
        ]
        for part in parts:
            wanted |= part.match()
        for part in parts:
            part.finish(wanted)

    def skips(self, name: str) -> bool:
        """Return whether this model's checkpoints leave out `name`."""
        return name in self._left_out


class ModuleMatch:
    """Matches one module with its entries in the checkpoint."""

    def __init__(
        self, match: Match, path: Path, module: nn.Module, names: Names, *, model: ModelState
    ) -> None:
        self._match, self._path, self._module, self._names = match, path, module, names
        self._model = model
        self._prefix = f"{dotted(path)}." if path else ""
        self._state = own_state(module)
        self._replaced: dict[str, Callable[[Values], Any]] = {}

    def match(self) -> set[str]:
        """Decide which stored entry each entry of the module's `state_dict` is loaded from. Return
        the names of these stored entries, relative to the module's path."""
        memory, wanted = memory_of(self._module), set()
        for raw, value in self._state.items():
            if self._model.skips(self._names.of(raw)):
                continue
            name = self._stored_as(raw)
            wanted.add(name)
            own = memory.get(raw)
            if own is not None and _is_memory(value, own):
                self._fill(name, own)
            else:
                self._request(raw, name)
        return wanted

    def finish(self, wanted: set[str]) -> None:
        """Plan a call of the module's own `load_state_dict`, if it needs one. `wanted`: names that
        `match` has returned for all parts of the model. This adds the names of further entries
        that are read."""
        if is_custom(self._module):
            self._match_more(wanted)
        if self._replaced or is_custom(self._module):
            self._match.then(self._take)

    def _match_more(self, wanted: set[str]) -> None:
        """Plan to read stored entries that the module does not have yet: its own code may create
        them when it loads. Add their names to `wanted`."""
        stored = self._match.stored
        below = stored.below(self._path).children
        customs = [n for n, m in self._module.named_modules() if _has_own_code(m)]
        for key in below:
            name = str(key)
            is_of_component = not self._path and name in self._match.others
            is_custom_entry = any(not n or name.startswith(f"{n}.") for n in customs)
            if is_custom_entry and name not in wanted and not is_of_component:
                wanted.add(name)
                self._request(name, name)

    def _stored_as(self, raw: str) -> str:
        """Return the checkpoint's name for the entry `raw` of the module's `state_dict`, relative
        to the module's path."""
        name, match = self._names.of(raw), self._match
        if not match.stored.holds(self._prefix + name, (*self._path, name)):
            for other in self._names.earlier(raw):
                if match.stored.holds(self._prefix + other, (*self._path, other)):
                    return other
        return name

    def _fill(self, name: str, own: torch.Tensor) -> None:
        match, path = self._match, (*self._path, name)
        if not is_plain_tensor(own):
            match_inside(match, own, path, match.stored.below(path), match.stored.node(path))
        elif name in self._model.may_lack and match.stored.tensor(self._prefix + name) is None:
            match.lacking.append(self._prefix + name)
        else:
            match.fill(self._prefix + name, own)

    def _request(self, raw: str, name: str) -> None:
        """Plan to read the stored entry `name` and pass it to `load_state_dict` as `raw`, since it
        is not a parameter or buffer that can be filled in place."""
        path, fresh = (*self._path, name), self._state.get(raw)
        template = fresh if isinstance(fresh, torch.Tensor) and is_plain_tensor(fresh) else None
        make = self._match.request_at(
            path, lambda entry, _: template if entry.path == path else None
        )
        if make is not None:
            self._replaced[raw] = make
        elif name in self._model.may_lack:
            self._match.lacking.append(self._prefix + name)
        else:
            self._match.missing(self._prefix + name)

    def _take(self, values: Values) -> None:
        """Pass the module its state, in which its own tensors have been filled already."""
        state = own_state(self._module)
        for raw, make in self._replaced.items():
            state[raw] = make(values)
        hand_over(self._module, state, dotted(self._path) or "model")


def own_state(module: nn.Module) -> dict[str, Any]:
    """Return a module's `state_dict`, not detached unless the module overrides the method."""
    with torch.no_grad():
        if type(module).state_dict is nn.Module.state_dict:
            # Without `keep_vars` torch detaches every DTensor, which is slow. Readers and writers
            # detach the local tensors instead.
            state: dict[str, Any] = module.state_dict(keep_vars=True)
        else:
            state = module.state_dict()
    if isinstance(state, Mapping) and {*map(type, state)} <= {str}:
        return state
    found = f"a {type_name(state)}"
    if isinstance(state, Mapping):
        key = next(key for key in state if type(key) is not str)
        found = f"a dict with the key {key!r}, a {type_name(key)}"
    raise UsageError(
        f"`state_dict()` of the module {type(module).__qualname__} must return a dict with text "
        f"keys, found: {found}",
        hint="return other state from `get_extra_state`, and restore it in `set_extra_state`",
    )


def memory_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by their names in `state_dict`."""
    memory: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    memory.update(module.named_buffers(remove_duplicate=False))
    return memory


def _is_memory(value: Any, own: torch.Tensor) -> bool:
    """Return whether `value` of a state dict is the tensor `own`, or shares its memory."""
    if value is own:
        return not isinstance(own, UNINITIALIZED)
    if not isinstance(value, torch.Tensor) or not (is_plain_tensor(value) and is_plain_tensor(own)):
        return False
    alike = value.dtype == own.dtype and value.shape == own.shape
    return alike and same_memory(value, own)


_HOOKS = (
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)

_METHODS = (
    "load_state_dict",
    "_load_from_state_dict",
    "state_dict",
    "_save_to_state_dict",
    "set_extra_state",
)


def is_custom(module: nn.Module) -> bool:
    """Return whether a module, or one inside it, has its own code to save or load."""
    return any(map(_has_own_code, module.modules()))


def _has_own_code(module: nn.Module) -> bool:
    cls: Any = type(module)
    if _overrides(cls):
        return True
    hooks = (hook for kind in _HOOKS for hook in (getattr(module, kind, None) or {}).values())
    # Torch's own hooks only rename keys and gather shards, which an in-place load does not need.
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
    """Raise UsageError if a module is wrapped by FSDP1."""
    for name, child in module.named_modules():
        cls = type(child)
        if cls.__name__ == "FullyShardedDataParallel" and cls.__module__.startswith(
            "torch.distributed.fsdp"
        ):
            raise UsageError(
                f"`{name or 'the model'}` is wrapped by FullyShardedDataParallel (FSDP1), which "
                "has its own form of state",
                hint="wrap it with `torch.distributed.fsdp.fully_shard` (FSDP2) instead: "
                "https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html",
            )


def adapted(parts: Sequence[nn.Module]) -> tuple[ModelState, ModelState]:
    """Return two components of a model that is trained in part: one for checkpoints, without the
    parameters that were never trained; and one for the base model, which may lack trained ones.

    Each save and load decides again which parameters are trained.
    """
    trained = Trained()
    kept, whole = (ModelState(parts, trained=trained, is_base=is_base) for is_base in (False, True))
    # Record parameters that are trained now, since they may be frozen at the first save.
    kept.state_dict()
    return kept, whole


def named_parameters(parts: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield each parameter once, under its first name."""
    for part in parts:
        names = Names(part)
        for name, parameter in part.named_parameters():
            yield names.of(name), parameter
