"""Training runs of Lightning and Fabric: commands of `host_runs.py`."""

from __future__ import annotations

import os
from typing import Any

from host_runs import keep_weights, kill_at, limit_files, note_start


def train_by_lightning(
    out: str,
    *,
    epochs: int = 3,
    plain: bool = False,
    resume: str | None = None,
    kill: str | None = None,
    times: int = 1,
    rank_killed: int = 0,
    limit: int | None = None,
    dies: bool = False,
    sharded: bool = False,
    result: str | None = None,
    top_k: int = -1,
) -> None:
    """Train by Lightning's Trainer, with a checkpoint after each epoch of 4 steps.

    `sharded`: FSDP2 by ModelParallel. `limit`: largest file that epoch 1 may write; `dies`: the
    process is killed there.
    """
    import pytorch_lightning as pl
    import torch
    from torch.utils.data import DataLoader

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Linear(64, 16))

        def configure_model(self) -> None:
            if sharded:
                from torch.distributed.fsdp import fully_shard

                mesh = self.device_mesh
                assert mesh is not None
                fully_shard(self.model, mesh=mesh["data_parallel"])

        def training_step(self, batch: Any) -> Any:
            loss = (self.model(torch.nn.functional.dropout(batch, 0.1)) - batch).square().mean()
            self.log("loss", loss.detach(), sync_dist=sharded)
            return loss

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
            # Lightning restores no random state.
            torch.manual_seed(self.global_step)
            if limit is not None and self.global_step == 4:
                limit_files(limit, dies=dies)

        def on_train_start(self) -> None:
            if result is not None:
                note_start(result, self.global_step)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            # A schedule by epochs would be behind: the save comes before the end of the epoch.
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    torch.manual_seed(0)
    module = Module()
    trainer = _trainer(out, plain=plain, sharded=sharded, max_epochs=epochs, top_k=top_k)
    if kill is not None and int(os.environ.get("RANK", "0")) == rank_killed:
        kill_at(kill, times=times)
    rows = torch.randn((8, 16), generator=torch.Generator().manual_seed(1))
    trainer.fit(module, DataLoader(rows, batch_size=2), ckpt_path=resume)  # type: ignore[arg-type]
    if result is not None:
        keep_weights(module.model, result)


def _trainer(out: str, *, plain: bool, sharded: bool, max_epochs: int, top_k: int) -> Any:
    """Lightning's Trainer, with a callback that saves after every fourth step."""
    import pytorch_lightning as pl

    import holdfast

    callback = pl.callbacks.ModelCheckpoint(
        dirpath=out,
        filename="{step}",
        monitor="step",
        mode="max",
        save_top_k=top_k,
        save_last=True,
        every_n_train_steps=4,
    )
    safe: Any = holdfast.hosts.lightning
    options: dict[str, Any] = {"plugins": [] if plain else [safe.HoldfastIO()]}
    if sharded:
        from pytorch_lightning.strategies import ModelParallelStrategy

        sizes: dict[str, Any] = {"data_parallel_size": 2, "tensor_parallel_size": 1}
        strategy = (ModelParallelStrategy if plain else safe.ModelParallel)(**sizes)
        options = {"strategy": strategy, "devices": 2}
    else:
        options["devices"] = 1
    return pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


def train_by_fabric(
    out: str,
    *,
    epochs: int = 3,
    plain: bool = False,
    resume: str | None = None,
    kill: str | None = None,
    times: int = 1,
    rank_killed: int = 0,
    limit: int | None = None,
    dies: bool = False,
    sharded: bool = False,
    result: str | None = None,
) -> None:
    """A loop with Fabric that saves `last.ckpt` and one checkpoint per epoch of 4 steps."""
    import lightning_fabric
    import torch

    import holdfast

    safe: Any = holdfast.hosts.lightning
    options: dict[str, Any] = {"plugins": [] if plain else [safe.HoldfastIO()]}
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Linear(64, 16))
    if sharded:
        from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
        from torch.distributed.fsdp import fully_shard

        def parallelize(module: Any, mesh: Any) -> Any:
            return fully_shard(module, mesh=mesh["data_parallel"])

        cls = ModelParallelStrategy if plain else safe.FabricModelParallel
        strategy = cls(parallelize, data_parallel_size=2, tensor_parallel_size=1)
        options = {"strategy": strategy, "devices": 2}
    fabric = lightning_fabric.Fabric(accelerator="cpu", **({"devices": 1} | options))
    fabric.launch()
    wrapped: Any = fabric.setup_module(model)
    optimizer: Any = fabric.setup_optimizers(torch.optim.AdamW(wrapped.parameters(), lr=0.01))
    state: dict[str, Any] = {"model": wrapped, "optimizer": optimizer, "epoch": 0}
    if resume is not None:
        fabric.load(resume, state)
    if result is not None:
        note_start(result, 4 * state["epoch"])
    if kill is not None and fabric.global_rank == rank_killed:
        kill_at(kill, times=times)
    rows = torch.randn((8, 16), generator=torch.Generator().manual_seed(1))
    for epoch in range(state["epoch"], epochs):
        if limit is not None and epoch == 1:
            limit_files(limit, dies=dies)
        for batch in rows.split(2):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            fabric.backward((wrapped(batch) - batch).square().mean())
            optimizer.step()
        state["epoch"] = epoch + 1
        fabric.save(f"{out}/step={4 * epoch + 4}.ckpt", state)
        fabric.save(f"{out}/last.ckpt", state)
    if result is not None:
        keep_weights(wrapped, result)
