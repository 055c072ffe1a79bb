"""Simulate a power cut at every operation of saves by two processes, and load the results.

    python -m benchmarks.crash_report              the table of docs/crash-report.md
    python -m benchmarks.crash_report --seeds 2    fewer states per cut

Compares Holdfast, stock torch.distributed.checkpoint and, if installed, TorchTitan's retention.
Each rank's file operations are recorded (`recording.py`). For a power cut after each operation,
every state that it can leave is written to disk and loaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.power_cuts import cuts, fingerprint
from benchmarks.ranks import free_port
from benchmarks.recording import (
    Timed,
    merged,
    recorded_folder,
    tree_after,
    tree_at,
    write_tree,
)

SIZE = 2
ROWS = 64
OUTCOMES = ("old", "new", "mixed", "start fails", "lost")
"""Outcomes of a start, which docs/crash-report.md explains."""

VERSIONS = ("killed", "lost", "reordered", "torn")

Save = Callable[[Path, Any, int], None]
"""`save(folder, state, number)`: save a state whose elements all equal `number`."""

Start = Callable[[Path], float | None]
"""`start(folder)`: load in a new process, and return the number; NaN for a mix of several, None if
there is no checkpoint. An exception would end the next start."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """Saves by one system, and how the next start loads."""

    system: str
    what: str
    before: tuple[int, ...]
    """Numbers of the durable saves before the power cut."""

    saves: tuple[int, ...]
    """Numbers of the saves in which the power is cut."""

    save: Save
    start: Start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=6, help="states for each of reordered, torn")
    seeds = parser.parse_args().seeds
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    head = ("operation", "library", "power cut", "states", *OUTCOMES)
    print_line(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for protocol in protocols():
        started = time.perf_counter()
        num_operations, counter = survey(protocol, seeds)
        for version in VERSIONS:
            counts = [counter[version, outcome] for outcome in OUTCOMES]
            row = (protocol.what, protocol.system, version, sum(counts), *counts)
            print_line(f"| {' | '.join(map(str, row))} |")
        sys.stderr.write(
            f"{protocol.what}, {protocol.system}: {num_operations} operations, "
            f"{time.perf_counter() - started:.0f} s\n"
        )


def print_line(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def survey(protocol: Protocol, seeds: int) -> tuple[int, Counter[tuple[str, str]]]:
    """Count the operations of the saves, and the outcomes by version and kind."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "root"
        root.mkdir()
        records, returned_at = run(protocol, root)
        operations = merged(records)
        assert tree_after(operations) == tree_at(root), "a write was not recorded"
        times = sorted(at for record in records for at, _ in record)
        durable = sum(at <= returned_at[len(protocol.before)] for at in times)
        numbers = (0, *protocol.before, *protocol.saves)
        outcomes: dict[tuple[int, int], str] = {}
        counter: Counter[tuple[str, str]] = Counter()
        for cut, tree in cuts(operations, durable=durable, seeds=range(seeds)):
            done = durable + cut.at
            # A save has returned if it did so before the first operation after the cut.
            now = times[done] if done < len(times) else returned_at[-1]
            promised = max(n for n, at in zip(numbers, returned_at, strict=True) if at <= now)
            key = (fingerprint(tree), promised)
            if key not in outcomes:
                folder = Path(temporary) / "cut"
                write_tree(tree, folder)
                outcomes[key] = outcome_of(protocol, folder, promised)
                shutil.rmtree(folder)
            counter[cut.version, outcomes[key]] += 1
        return len(operations) - durable, counter


def outcome_of(protocol: Protocol, folder: Path, promised: int) -> str:
    """Start from `folder`, and compare with `promised`, the newest save that had returned."""
    try:
        number = protocol.start(folder)
    except BaseException:  # noqa: BLE001 - stock DCP raises a BaseException
        return "start fails"
    if number is None:
        return "lost" if promised else "old"
    if number != number or number < 1:
        return "mixed"
    if number < promised:
        return "lost"
    return "old" if number == promised else "new"


# ------------------------------------------------------------------------------ in two processes


def run(protocol: Protocol, root: Path) -> tuple[list[list[Timed]], list[int]]:
    """Run the saves on two ranks.

    Returns each rank's operations, and the times at which each save had returned on all ranks; the
    first is 0, for no save.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (protocol, root, free_port(), queue)
    ranks = [context.Process(target=run_rank, args=(rank, *arguments)) for rank in range(SIZE)]
    for process in ranks:
        process.start()
    results = [queue.get(timeout=300) for _ in ranks]
    for process in ranks:
        process.join()
    returned_at = [max(times) for times in zip(*(times for _, times in results), strict=True)]
    return [record for record, _ in results], returned_at


def run_rank(rank: int, protocol: Protocol, root: Path, port: int, queue: Any) -> None:
    """Run the saves as one rank, and record its file operations."""
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo", rank=rank, world_size=SIZE)
    returned_at = [0]
    with recorded_folder(root) as operations:
        state = sharded()
        for number in (*protocol.before, *protocol.saves):
            for tensor in state.values():
                tensor.fill_(number)
            protocol.save(root, state, number)
            dist.barrier()
            returned_at.append(time.monotonic_ns())
            dist.barrier()
        while _managers:
            _managers.pop().close()
    queue.put((operations, returned_at))
    queue.close()
    queue.join_thread()
    dist.barrier()
    os._exit(0)


def sharded() -> dict[str, Any]:
    """Make two tensors, sharded by rows."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (SIZE,))
    return {n: distribute_tensor(torch.zeros(ROWS, 96), mesh, [Shard(0)]) for n in ("a", "b")}


def unsharded() -> dict[str, Any]:
    """Make the two tensors of `sharded` in one process."""
    import torch

    return {name: torch.zeros(ROWS, 96) for name in ("a", "b")}


def number_of(state: dict[str, Any]) -> float:
    """Return the value of all elements; NaN if they differ."""
    import torch

    values = {v for tensor in state.values() for v in torch.unique(tensor).tolist()}
    return float(values.pop()) if len(values) == 1 else float("nan")


# ------------------------------------------------------------------------------------ the systems


def protocols() -> list[Protocol]:
    """Return the protocols of the installed systems."""
    result = []
    for what, before, saves in (("first save", (), (1,)), ("save in place", (1,), (2,))):
        result.append(Protocol("torch DCP", what, before, saves, save_dcp, start_dcp))
        result.append(Protocol("Holdfast", what, before, saves, save_holdfast, start_holdfast))
    keeps_two = partial(Protocol, what="saves that keep two", before=(1, 2), saves=(3, 4))
    if importlib.util.find_spec("torchtitan") is not None:
        result.append(keeps_two("TorchTitan", save=save_titan, start=start_titan))
    result.append(keeps_two("Holdfast", save=save_managed, start=start_managed))
    result.append(keeps_two("Holdfast, async", save=save_managed_async, start=start_managed))
    return result


def save_dcp(folder: Path, state: Any, _number: int) -> None:
    """Save with `dcp.save` into one folder."""
    from torch.distributed.checkpoint.state_dict_saver import save

    save(state, checkpoint_id=folder / "checkpoint")


def start_dcp(folder: Path) -> float | None:
    """Load with `dcp.load` if there is an index."""
    from torch.distributed.checkpoint.state_dict_loader import load

    if not (folder / "checkpoint/.metadata").exists():
        return None
    state = unsharded()
    load(state, checkpoint_id=folder / "checkpoint", no_dist=True)
    return number_of(state)


def save_holdfast(folder: Path, state: Any, _number: int) -> None:
    """Save with `holdfast.save` to one path."""
    import holdfast

    holdfast.save(folder / "checkpoint", state, overwrite=True)


def start_holdfast(folder: Path) -> float | None:
    """Load with `holdfast.load`."""
    import holdfast

    state = unsharded()
    try:
        holdfast.load(folder / "checkpoint", state)
    except holdfast.NotFoundError:
        return None
    return number_of(state)


_managers: list[Any] = []
"""The manager that a rank keeps open between saves, if any."""


def save_managed(folder: Path, state: Any, number: int, async_mode: Any = "disabled") -> None:
    """Save with Holdfast's `CheckpointManager`, which keeps two, and wait for it."""
    if not _managers:
        _managers.append(holdfast_manager(folder, state, async_mode))
    _managers[0].save(number)
    _managers[0].wait()


def save_managed_async(folder: Path, state: Any, number: int) -> None:
    """Save with `async_mode = "async"`, and wait for it."""
    save_managed(folder, state, number, "async")


def start_managed(folder: Path) -> float | None:
    """Load with a new manager."""
    state = unsharded()
    with holdfast_manager(folder, state, "disabled") as manager:
        step = manager.load()
    return number_of(state) if step else None


def module_of(state: Any) -> Any:
    """Make a module whose buffers are the state."""
    import torch

    module = torch.nn.Module()
    for name, tensor in state.items():
        module.register_buffer(name, tensor)
    return module


def holdfast_manager(folder: Path, state: Any, async_mode: Any) -> Any:
    """Make Holdfast's manager of the state."""
    from holdfast import CheckpointConfig, CheckpointManager

    config = CheckpointConfig(enable=True, interval=1, keep_latest_k=2, async_mode=async_mode)
    return CheckpointManager(folder / "steps", model=module_of(state), config=config)


def save_titan(folder: Path, state: Any, number: int) -> None:
    """Save with TorchTitan's `CheckpointManager`, which keeps two.

    Waits until its thread has deleted old checkpoints, as in a run that saves every few minutes.
    """
    if not _managers:
        _managers.append(titan_manager(folder, state))
    manager = _managers[0]
    manager.save(number)
    while manager.purge_thread is not None and manager.purge_queue.qsize():
        time.sleep(0.01)


def start_titan(folder: Path) -> float | None:
    """Load the newest checkpoint with TorchTitan's `CheckpointManager`."""
    state = unsharded()
    manager = titan_manager(folder, state)
    loaded = manager.load()
    manager.close()
    return number_of(state) if loaded else None


def titan_manager(folder: Path, state: Any) -> Any:
    """Make TorchTitan's manager of the state, with empty optimizers, schedulers and data loader."""
    import torch.distributed as dist
    from torchtitan.components.checkpointer.dcp import CheckpointManager

    if not dist.is_initialized():
        address = f"tcp://127.0.0.1:{free_port()}"
        dist.init_process_group("gloo", rank=0, world_size=1, init_method=address)
    config = CheckpointManager.Config(enable=True, interval=1, keep_latest_k=2, folder="steps")
    return CheckpointManager(
        config,
        dataloader=Stateless(),
        model_parts=[module_of(state)],
        optimizers=Stateless(),
        lr_schedulers=Stateless(),
        states={},
        sd_adapter=None,
        base_folder=str(folder),
    )


class Stateless:
    """Object with an empty state."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


if __name__ == "__main__":
    main()
