"""Saves of other frameworks, with Holdfast and without: `python -m benchmarks.hosts [HOST ...]`.

Each host runs in a process of its own, and saves a model with its AdamW state. The two ways to save
take turns on the same state, after a sync of the disk. A save ends when the host's own call
returns. Then, off the clock, `holdfast` makes its checkpoint durable; the CPU time includes that.
Stock hosts sync nothing, except DCP and TorchTitan, whose writer syncs its files.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch import nn

from benchmarks.meter import Figure, machine, run_rounds
from benchmarks.options import silence_warnings
from benchmarks.ranks import free_port
from benchmarks.states import State, llama_like
from holdfast.dcp import Reader, Writer

dcp_api: Any = torch.distributed.checkpoint
"""Untyped, since torch does not export its functions to type checkers."""

Save = Callable[[int], object]
"""Saves the checkpoint of a number, and lets the host delete older ones."""

Wait = Callable[[], object]
"""Waits until the last checkpoint is durable."""

WIDTH = 1024


def network(nbytes: int) -> nn.Sequential:
    """Linear layers which have, with two AdamW moments, about `nbytes` bytes of state."""
    count = max(1, round(nbytes / (12 * WIDTH * WIDTH)))
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(count)]
    return nn.Sequential(*layers)


def figures_of(saves: dict[str, tuple[Save, Wait]], rounds: int) -> dict[str, list[Figure]]:
    """Let the systems save in turns."""
    numbers = iter(range(1, 10_000))

    def measured(save: Save, wait: Wait) -> Figure:
        os.sync()
        number = next(numbers)
        cpu, started = time.process_time(), time.perf_counter()
        save(number)
        seconds = time.perf_counter() - started
        wait()
        durable = time.perf_counter() - started
        cpu = time.process_time() - cpu
        return {"seconds": seconds, "cpu_s": cpu, "durable_s": durable}

    systems = {
        name: (lambda save=save, wait=wait: measured(save, wait))
        for name, (save, wait) in saves.items()
    }
    return run_rounds(systems, rounds)


def nothing() -> None:
    pass


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    os.environ.update(
        RANK="0",
        WORLD_SIZE="1",
        LOCAL_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------- hosts


def trainer(nbytes: int, rounds: int, folder: Path) -> dict[str, list[Figure]]:
    """Hugging Face Trainer with `save_total_limit=2`."""
    import transformers

    from holdfast.hosts.transformers import HoldfastMixin

    class SafeTrainer(HoldfastMixin, transformers.Trainer):  # type: ignore[misc]
        pass

    class Model(transformers.PreTrainedModel):  # type: ignore[misc]
        config_class = transformers.PretrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.net = network(nbytes)
            self.post_init()

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.net(x).square().mean()}

    def saving(cls: type, name: str) -> tuple[Save, Wait]:
        one: Any = cls(
            model=Model(transformers.PretrainedConfig()),
            args=transformers.TrainingArguments(
                str(folder / name),
                max_steps=1,
                save_strategy="no",
                save_total_limit=2,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                logging_strategy="no",
            ),
            train_dataset=[{"x": torch.ones(WIDTH)}] * 8,
        )
        one.train()

        def save(number: int) -> None:
            one.state.global_step = number
            one._save_checkpoint(one.model, trial=None)

        return save, one._background().wait if isinstance(one, HoldfastMixin) else nothing

    stock, ours = saving(transformers.Trainer, "stock"), saving(SafeTrainer, "ours")
    return figures_of({"stock": stock, "holdfast": ours}, rounds)


def accelerate(nbytes: int, rounds: int, folder: Path) -> dict[str, list[Figure]]:
    """Accelerate with automatic names and `total_limit=2`."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    from holdfast.hosts.accelerate import prepare

    def saving(name: str) -> tuple[Save, Wait]:
        project = ProjectConfiguration(
            project_dir=str(folder / name), automatic_checkpoint_naming=True, total_limit=2
        )
        accelerator: Any = Accelerator(cpu=True, project_config=project)
        wait: Wait = nothing
        if name == "ours":
            accelerator = prepare(accelerator)
            wait = accelerator.save_state.__self__._background.wait
        model: Any = network(nbytes)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        accelerator.backward(model(torch.ones(1, WIDTH)).square().mean())
        optimizer.step()
        return lambda _: accelerator.save_state(), wait

    return figures_of({"stock": saving("stock"), "holdfast": saving("ours")}, rounds)


def lightning(nbytes: int, rounds: int, folder: Path) -> dict[str, list[Figure]]:
    """Lightning's Trainer, one file per checkpoint. Keeps two."""
    from lightning_fabric.plugins import TorchCheckpointIO

    from holdfast.hosts.lightning import HoldfastIO

    ours = HoldfastIO()
    plugins = {"stock": TorchCheckpointIO(), "holdfast": ours}

    def choose(one: Any, name: str) -> None:
        one.strategy.checkpoint_io = plugins[name]

    return _in_lightning(nbytes, rounds, folder, {}, choose, ours._background.wait)


def model_parallel(nbytes: int, rounds: int, folder: Path) -> dict[str, list[Figure]]:
    """Lightning's `ModelParallelStrategy`, one rank of FSDP2. Keeps two."""
    from pytorch_lightning.strategies import ModelParallelStrategy

    import holdfast.hosts.lightning

    sizes: dict[str, Any] = {"data_parallel_size": 1, "tensor_parallel_size": 1}
    strategy: Any = holdfast.hosts.lightning.ModelParallel(**sizes)

    def choose(one: Any, name: str) -> None:
        # The stock class has another layout, so the strategy borrows its two methods.
        for method in ("save_checkpoint", "remove_checkpoint"):
            one.strategy.__dict__.pop(method, None)
            if name == "stock":
                stock = getattr(ModelParallelStrategy, method)
                setattr(one.strategy, method, partial(stock, one.strategy))

    options = {"strategy": strategy}
    wait = strategy._background().wait
    return _in_lightning(nbytes, rounds, folder, options, choose, wait)


def _in_lightning(
    nbytes: int,
    rounds: int,
    folder: Path,
    options: dict[str, Any],
    choose: Callable[[Any, str], None],
    wait: Wait,
) -> dict[str, list[Figure]]:
    """Save in the first step of a training. `choose` makes the trainer save by one system."""
    import pytorch_lightning as pl

    figures: dict[str, list[Figure]] = {}

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(nbytes)

        def configure_model(self) -> None:
            if "strategy" in options and self.device_mesh is not None:
                from torch.distributed.fsdp import fully_shard

                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Any) -> Any:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            def saving(name: str) -> Save:
                kept: list[Path] = []

                def save(number: int) -> None:
                    kept.append(folder / name / f"step={number}.ckpt")
                    choose(trainer, name)
                    trainer.save_checkpoint(kept[-1])
                    if len(kept) > 2:
                        trainer.strategy.remove_checkpoint(kept.pop(0))

                return save

            saves = {"stock": (saving("stock"), nothing), "holdfast": (saving("holdfast"), wait)}
            figures.update(figures_of(saves, rounds))

    one = pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        devices=1,
        callbacks=[Saves()],
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    rows: Any = [torch.ones(WIDTH)]
    one.fit(Module(), torch.utils.data.DataLoader(rows))
    return figures


def torchtitan(nbytes: int, rounds: int, folder: Path) -> dict[str, list[Figure]]:
    """TorchTitan's manager with `keep_latest_k=2`, one rank of FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torchtitan.components import checkpointer
    from torchtitan.components.optimizer import (
        LRSchedulersContainer,
        OptimizersContainer,
        ParamGroupConfig,
    )

    import holdfast.hosts.torchtitan

    with one_rank():
        model = network(nbytes)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        group = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={})
        config = OptimizersContainer.Config(param_groups=[group], implementation="for-loop")
        optimizers = config.build(model_parts=[model])
        schedule = LRSchedulersContainer.Config(warmup_steps=2)
        schedulers = schedule.build(optimizers=optimizers, training_steps=10)
        model(torch.ones(1, WIDTH)).square().mean().backward()
        optimizers.step()

        def saving(module: Any, name: str) -> tuple[Save, Wait]:
            keys: dict[str, Any] = {"enable": True, "interval": 1, "keep_latest_k": 2}
            manager = module.CheckpointManager.Config(**keys).build(
                dataloader=None,
                model_parts=[model],
                optimizers=optimizers,
                lr_schedulers=schedulers,
                states={},
                sd_adapter=None,
                base_folder=str(folder / name),
            )
            # As every run begins. There is nothing to load.
            manager.load(step=-1)
            return manager.save, nothing

        stock, ours = saving(checkpointer, "stock"), saving(holdfast.hosts.torchtitan, "ours")
        return figures_of({"stock": stock, "holdfast": ours}, rounds)


def dcp_save(nbytes: int, rounds: int, folder: Path) -> dict[str, list[Figure]]:
    """`dcp.save` to a path, and by `holdfast.dcp.Writer`."""
    state = llama_like(nbytes)

    def saving(name: str) -> tuple[Save, Wait]:
        return lambda number: _save(name, folder / name / f"{number}", state), nothing

    return figures_of({"stock": saving("stock"), "holdfast": saving("holdfast")}, rounds)


def dcp_load(nbytes: int, rounds: int, folder: Path) -> dict[str, list[Figure]]:
    """`dcp.load` from a path, and by `holdfast.dcp.Reader`: each what its writer has saved, from
    the page cache."""
    state = llama_like(nbytes)
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}

    def loading(name: str) -> tuple[Save, Wait]:
        _save(name, folder / name, state)
        if name == "stock":
            return lambda _: dcp_api.load(target, checkpoint_id=folder / name), nothing
        return lambda _: dcp_api.load(target, storage_reader=Reader(folder / name)), nothing

    return figures_of({"stock": loading("stock"), "holdfast": loading("holdfast")}, rounds)


def _save(name: str, path: Path, state: State) -> None:
    if name == "stock":
        dcp_api.save(state, checkpoint_id=path)
    else:
        dcp_api.save(state, storage_writer=Writer(path))


HOSTS = {
    "trainer": trainer,
    "accelerate": accelerate,
    "lightning": lightning,
    "model_parallel": model_parallel,
    "torchtitan": torchtitan,
    "dcp_save": dcp_save,
    "dcp_load": dcp_load,
}


def row(host: str, figures: dict[str, list[Figure]]) -> str:
    """One row of the table: medians, and the ratio of the medians."""

    def median(system: str, column: str) -> float:
        return statistics.median(figure[column] for figure in figures[system])

    seconds = [median(system, "seconds") for system in ("stock", "holdfast")]
    cpu = [median(system, "cpu_s") for system in ("stock", "holdfast")]
    title = (HOSTS[host].__doc__ or "").partition("\n\n")[0].rstrip(".").replace("\n    ", " ")
    cells = [title, f"{seconds[0]:.2f} s", f"{seconds[1]:.2f} s", f"{seconds[1] / seconds[0]:.2f}"]
    cells += [f"{cpu[0]:.2f} s", f"{cpu[1]:.2f} s", f"{median('holdfast', 'durable_s'):.2f} s"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print a table with one row per host."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("hosts", nargs="*", help=f"of {', '.join(HOSTS)}")
    parser.add_argument("--mb", type=float, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path("outputs"), help="on the disk measured")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    sizes = ["--mb", str(options.mb), "--rounds", str(options.rounds)]
    if options.one:
        silence_warnings()
        os.environ["HF_HUB_OFFLINE"] = "1"
        with tempfile.TemporaryDirectory(dir=options.folder.resolve()) as folder:
            figures = HOSTS[options.one](int(options.mb * 1e6), options.rounds, Path(folder))
        sys.stdout.write(f"{json.dumps(figures)}\n")
        return
    heads = ("save", "host", "with Holdfast", "ratio", "CPU", "CPU with Holdfast", "durable after")
    print(f"Machine: {machine()}.\n\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")  # noqa: T201
    for host in options.hosts or HOSTS:
        command = [sys.executable, "-m", "benchmarks.hosts", "--one", host, *sizes]
        command += ["--folder", str(options.folder)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        print(row(host, json.loads(done.stdout.splitlines()[-1])), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
