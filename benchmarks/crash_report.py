"""Cut the power at every operation of real saves by two processes, and say what the next start
finds: Holdfast, stock torch.distributed.checkpoint, and TorchTitan's retention where that is there.

    python -m benchmarks.crash_report                 the table of docs/crash-report.md
    python -m benchmarks.crash_report --seeds 2       fewer states a cut

Each rank's file operations are recorded as it does them (holdfast.testing.recording), then every
state that a power cut can leave after each of them is made on disk and loaded.
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
from pathlib import Path
from typing import Any

from benchmarks.ranks import free_port
from holdfast.testing.crashes import fingerprint
from holdfast.testing.disk import cuts
from holdfast.testing.recording import (
    Timed,
    merged,
    recorded_folder,
    tree_after,
    tree_at,
    write_tree,
)

SIZE = 2
ROWS = 64
OUTCOMES = {
    "old": "old",
    "new": "new",
    "mixed": "mixed",
    "unloadable": "start fails",
    "lost": "lost",
}
"""With their names in the table, which docs/crash-report.md explains."""

VERSIONS = ("killed", "lost", "reordered", "torn")

Save = Callable[[Path, Any, int], None]
"""`save(folder, state, number)`: save the state, whose every element is `number`."""

Start = Callable[[Path], float | None]
"""`start(folder)`: the number of what a new process loads; NaN for a mix, None where it takes the
folder for one without a checkpoint. What it raises, the next start would die of."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """What is done to a folder, and how the next start looks at it."""

    system: str
    what: str
    before: tuple[int, ...]
    """Saves that are there, and durable."""

    saves: tuple[int, ...]
    """Those in which the power goes."""

    save: Save
    start: Start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=6, help="states for each of reordered, torn")
    seeds = parser.parse_args().seeds
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    head = ("what", "by", "power cut", "states", *OUTCOMES.values())
    say(f"| {' | '.join(head)} |\n|{'---|' * len(head)}\n")
    for protocol in protocols():
        started = time.perf_counter()
        num_operations, found = survey(protocol, seeds)
        for version in VERSIONS:
            counts = [found[version, outcome] for outcome in OUTCOMES]
            row = (protocol.what, protocol.system, version, sum(counts), *counts)
            say(f"| {' | '.join(map(str, row))} |\n")
        sys.stderr.write(
            f"{protocol.what}, {protocol.system}: {num_operations} operations, "
            f"{time.perf_counter() - started:.0f} s\n"
        )


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def survey(protocol: Protocol, seeds: int) -> tuple[int, Counter[tuple[str, str]]]:
    """Operations of the saves, and outcomes by version and kind."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "root"
        root.mkdir()
        records, finished = run(protocol, root)
        operations = merged(records)
        assert tree_after(operations) == tree_at(root), "something was written that was not seen"
        times = sorted(at for record in records for at, _ in record)
        durable = sum(at <= finished[len(protocol.before)] for at in times)
        numbers = (0, *protocol.before, *protocol.saves)
        seen: dict[tuple[int, int], str] = {}
        found: Counter[tuple[str, str]] = Counter()
        for cut, tree in cuts(operations, durable=durable, seeds=range(seeds)):
            done = durable + cut.at
            # A save has returned at the latest before the first operation after it.
            now = times[done] if done < len(times) else finished[-1]
            promised = max(n for n, at in zip(numbers, finished, strict=True) if at <= now)
            key = (fingerprint(tree), promised)
            if key not in seen:
                folder = Path(place) / "cut"
                write_tree(tree, folder)
                seen[key] = outcome(protocol, folder, promised)
                shutil.rmtree(folder)
            found[cut.version, seen[key]] += 1
        return len(operations) - durable, found


def outcome(protocol: Protocol, folder: Path, promised: int) -> str:
    """What the next start comes to, where the save of `promised` had returned."""
    try:
        number = protocol.start(folder)
    except BaseException:  # noqa: BLE001 - stock raises a BaseException
        return "unloadable"
    if number is None:
        return "lost" if promised else "old"
    if number != number or number < 1:
        return "mixed"
    if number < promised:
        return "lost"
    return "old" if number == promised else "new"


# ------------------------------------------------------------------------------ in two processes


def run(protocol: Protocol, root: Path) -> tuple[list[list[Timed]], list[int]]:
    """What each rank did, and when each save had returned on all; first of all 0, for none."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (protocol, root, free_port(), queue)
    ranks = [context.Process(target=work, args=(rank, *arguments)) for rank in range(SIZE)]
    for process in ranks:
        process.start()
    results = [queue.get(timeout=300) for _ in ranks]
    for process in ranks:
        process.join()
    finished = [max(times) for times in zip(*(finished for _, finished in results), strict=True)]
    return [record for record, _ in results], finished


def work(rank: int, protocol: Protocol, root: Path, port: int, queue: Any) -> None:
    """One rank: save after save, every file operation kept."""
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo", rank=rank, world_size=SIZE)
    finished = [0]
    with recorded_folder(root) as done:
        state = sharded()
        for number in (*protocol.before, *protocol.saves):
            for tensor in state.values():
                tensor.fill_(number)
            protocol.save(root, state, number)
            dist.barrier()
            finished.append(time.monotonic_ns())
            dist.barrier()
        close()
    queue.put((done, finished))
    queue.close()
    queue.join_thread()
    dist.barrier()
    os._exit(0)


def sharded() -> dict[str, Any]:
    """Two tensors, sharded by rows."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (SIZE,))
    return {n: distribute_tensor(torch.zeros(ROWS, 96), mesh, [Shard(0)]) for n in ("a", "b")}


def whole() -> dict[str, Any]:
    """The same, on one process."""
    import torch

    return {name: torch.zeros(ROWS, 96) for name in ("a", "b")}


def number_of(state: dict[str, Any]) -> float:
    """What every element is; NaN where they differ."""
    import torch

    values = {v for tensor in state.values() for v in torch.unique(tensor).tolist()}
    return float(values.pop()) if len(values) == 1 else float("nan")


# ------------------------------------------------------------------------------------ the systems


def protocols() -> list[Protocol]:
    """Those of what is installed."""
    stock = (save_stock, start_stock)
    ours = (save_ours, start_ours)
    found = []
    for what, before, saves in (("first save", (), (1,)), ("save in place", (1,), (2,))):
        found.append(Protocol("torch DCP", what, before, saves, *stock))
        found.append(Protocol("Holdfast", what, before, saves, *ours))
    keeping = ("saves that keep two", (1, 2), (3, 4))
    if importlib.util.find_spec("torchtitan") is not None:
        found.append(Protocol("TorchTitan", *keeping, save_titan, start_titan))
    found.append(Protocol("Holdfast", *keeping, save_managed, start_managed))
    found.append(Protocol("Holdfast, async", *keeping, save_managed_in_background, start_managed))
    return found


def save_stock(folder: Path, state: Any, _number: int) -> None:
    """`dcp.save` into one folder."""
    from torch.distributed.checkpoint.state_dict_saver import save

    save(state, checkpoint_id=folder / "checkpoint")


def start_stock(folder: Path) -> float | None:
    """`dcp.load`, where there is an index, as whoever uses it looks for one."""
    from torch.distributed.checkpoint.state_dict_loader import load

    if not (folder / "checkpoint/.metadata").exists():
        return None
    state = whole()
    load(state, checkpoint_id=folder / "checkpoint", no_dist=True)
    return number_of(state)


def save_ours(folder: Path, state: Any, _number: int) -> None:
    """`holdfast.save` to one path."""
    import holdfast

    holdfast.save(folder / "checkpoint", state, overwrite=True)


def start_ours(folder: Path) -> float | None:
    """`holdfast.load`."""
    import holdfast

    state = whole()
    try:
        holdfast.load(folder / "checkpoint", state)
    except holdfast.NotFoundError:
        return None
    return number_of(state)


_open: list[Any] = []
"""What a rank keeps between two saves, and closes at the end."""


def close() -> None:
    """Close it."""
    while _open:
        _open.pop().close()


def save_managed(folder: Path, state: Any, number: int, async_mode: Any = "disabled") -> None:
    """`CheckpointManager.save`, keeping two."""
    if not _open:
        _open.append(manager(folder, state, async_mode))
    _open[0].save(number)
    _open[0].wait()


def save_managed_in_background(folder: Path, state: Any, number: int) -> None:
    """The same, with `async_mode = "async"`; a save has returned once it is waited for."""
    save_managed(folder, state, number, "async")


def start_managed(folder: Path) -> float | None:
    """A new manager in the folder, and its `load`."""
    state = whole()
    with manager(folder, state, "disabled") as held:
        step = held.load()
    return number_of(state) if step else None


def manager(folder: Path, state: Any, async_mode: Any) -> Any:
    """A manager of a module whose buffers are the state."""
    import torch

    from holdfast import CheckpointConfig, CheckpointManager

    module = torch.nn.Module()
    for name, tensor in state.items():
        module.register_buffer(name, tensor)
    config = CheckpointConfig(enable=True, interval=1, keep_latest_k=2, async_mode=async_mode)
    return CheckpointManager(folder / "steps", model=module, config=config)


def save_titan(folder: Path, state: Any, number: int) -> None:
    """TorchTitan's own `CheckpointManager.save`, keeping two; its thread has deleted when it
    returns, as it has in a run whose next save is minutes away."""
    if not _open:
        _open.append(titan(folder, state))
    _open[0].save(number)
    while _open[0].purge_thread is not None and _open[0].purge_queue.qsize():
        time.sleep(0.01)


def start_titan(folder: Path) -> float | None:
    """TorchTitan's own `CheckpointManager.load` of the newest step."""
    state = whole()
    held = titan(folder, state)
    found = held.load()
    held.close()
    return number_of(state) if found else None


def titan(folder: Path, state: Any) -> Any:
    """TorchTitan's manager of a module whose buffers are the state, and of nothing else."""
    import torch
    import torch.distributed as dist
    from torchtitan.components.checkpointer.dcp import CheckpointManager

    if not dist.is_initialized():
        address = f"tcp://127.0.0.1:{free_port()}"
        dist.init_process_group("gloo", rank=0, world_size=1, init_method=address)
    module = torch.nn.Module()
    for name, tensor in state.items():
        module.register_buffer(name, tensor)
    config = CheckpointManager.Config(enable=True, interval=1, keep_latest_k=2, folder="steps")
    return CheckpointManager(
        config,
        dataloader=Nothing(),
        model_parts=[module],
        optimizers=Nothing(),
        lr_schedulers=Nothing(),
        states={},
        sd_adapter=None,
        base_folder=str(folder),
    )


class Nothing:
    """State of which there is none."""

    def state_dict(self) -> dict[str, Any]:
        """None."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it."""


if __name__ == "__main__":
    main()
