"""The training loop."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from holdfast.dashboard.history import MetricsRow
from holdfast.errors import HoldfastError, UsageError
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.manager import CheckpointManager
from holdfast.storage.opening import is_url, local_path
from holdfast.trainer.config import Config
from holdfast.trainer.corpus import Tokenizer, Tokens, open_tokenizer, open_tokens
from holdfast.trainer.data import DataLoader
from holdfast.trainer.gradients import Gradients
from holdfast.trainer.metrics import Metrics, with_timings
from holdfast.trainer.optim import (
    apply_schedules,
    build_optimizers,
    build_schedulers,
    clip_gradients,
    overridden_settings,
)
from holdfast.trainer.parallel import (
    ParallelContext,
    build_model,
    num_parameters,
    raise_from_rank_0,
    sum_over_data,
)
from holdfast.trainer.published import FollowedModel, followed_model

logger: logging.Logger = logging.getLogger("holdfast.trainer")


@dataclass(slots=True)
class TrainState:
    """Counters of the training loop, saved under TorchTitan's names."""

    step: int = 0
    ntokens_seen: int = 0
    """Tokens trained on since the start, over all ranks."""

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, which are the same on every rank."""
        return {"step": self.step, "ntokens_seen": self.ntokens_seen}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from the counters in `state_dict`."""
        self.step = int(state_dict["step"])
        self.ntokens_seen = int(state_dict["ntokens_seen"])


class Run:
    """Model, optimizers, schedules and data of a run."""

    def __init__(self, config: Config, parallel: ParallelContext) -> None:
        """Build everything in its initial state. Collective."""
        _seed(config)
        config.check(parallel.world_size)
        self.config: Config = config
        self.parallel: ParallelContext = parallel
        tokenizer, tokens = _open_data(config, parallel)
        self.vocab_size: int = _vocab_size(config, tokenizer)
        self.published: FollowedModel = _published(config, parallel, self.vocab_size)
        self.stages: list[nn.Module] = build_model(
            config, parallel, self.vocab_size, flavor=self.published.flavor
        )
        self.optimizers: list[torch.optim.Optimizer] = build_optimizers(
            self.stages, config.optimizer
        )
        self.schedulers: list[LambdaLR] = build_schedulers(
            self.optimizers, config.lr_scheduler, config.training.steps
        )
        self.loader: DataLoader = DataLoader(
            tokens=tokens,
            seq_len=config.training.seq_len,
            seed=config.training.seed,
            batch_per_rank=config.training.batch_per_rank(parallel.dp_size),
            dp_rank=parallel.dp_rank,
            dp_size=parallel.dp_size,
        )
        self.state: TrainState = TrainState()
        self.gradients: Gradients = Gradients(config, parallel, self.stages)
        _log_start(config, parallel, self.stages, tokens)


def train(config: Config, parallel: ParallelContext) -> None:
    """Train the configured model to the last step, resuming from the newest checkpoint.

    Collective.

    Raises:
        HoldfastError: on every rank, if the settings, the data or a checkpoint are unusable.
    """
    # First, so that a URL is refused before the data set creates a folder of that name.
    dump_folder, checkpoint_folder = _folders(config)
    if config.checkpoint.create_seed_checkpoint:
        create_seed(config, parallel)
        return
    run = Run(config, parallel)
    with CheckpointManager(
        checkpoint_folder,
        model=run.stages,
        optimizers=run.optimizers,
        lr_schedulers=run.schedulers,
        dataloader=run.loader,
        states={"train_state": run.state},
        # Without `enable`, no other key has an effect: `arguments.prepare_start` has said so.
        config=config.checkpoint if config.checkpoint.enable else CheckpointConfig(),
        hub=run.published.hf_model,
    ) as manager:
        if is_finished(config, manager.final_step()):
            return
        step = manager.load(config.checkpoint.load_step)
        if is_finished(config, step):
            return
        apply_schedules(run.schedulers)
        for message in overridden_settings(run.optimizers, config.optimizer):
            logger.warning(
                "%s (--checkpoint.exclude_from_loading optimizer,lr_scheduler uses the configured "
                "value, with a new optimizer state)",
                message,
            )
        logger.info("training from step %d to %d", step, config.training.steps)
        metrics = Metrics(config.metrics, dump_folder, first_rank=parallel.rank == 0, step=step)
        started = time.perf_counter()
        try:
            take_steps(run, manager, metrics, first=step)
        finally:
            metrics.close(manager.timings())
    _log_end(run, config.training.steps - step, time.perf_counter() - started, manager.goodput())


def _folders(config: Config) -> tuple[Path, str]:
    """Return the folder of the run and the folder of its checkpoints."""
    dump_folder = local_path(config.job.dump_folder)
    if is_url(config.checkpoint.folder):
        return Path(dump_folder), config.checkpoint.folder
    # Refuse a folder such as `s3:/` before it is joined to another, which would hide the error.
    local_path(config.checkpoint.folder or ".")
    return Path(dump_folder), local_path(os.path.join(dump_folder, config.checkpoint.folder))  # noqa: PTH118 - keeps `//`


def create_seed(config: Config, parallel: ParallelContext) -> None:
    """Save the whole model's initial weights as the checkpoint of step 0. No training data is
    needed."""
    tokenizer = open_tokenizer(config.model.hf_assets_path)
    vocab_size = _vocab_size(config, tokenizer)
    flavor = _published(config, parallel, vocab_size).flavor
    stages = build_model(config, parallel, vocab_size, flavor=flavor)
    _, folder = _folders(config)
    checkpoint = replace(config.checkpoint, on_save_error="raise", async_mode="disabled")
    with CheckpointManager(folder, model=stages, config=checkpoint) as manager:
        manager.save_seed()


def take_steps(run: Run, manager: CheckpointManager, metrics: Metrics, *, first: int) -> None:
    """Take the steps after step `first` to the last, with metrics and checkpoints. Collective."""
    config, parallel, step = run.config, run.parallel, first
    # Time of the previous row of metrics, tokens since then, and `manager.blocked_s` at that time.
    started, tokens, blocked_s = time.perf_counter(), 0, 0.0
    try:
        while step < config.training.steps:
            inputs, labels = next(run.loader)
            loss = run.gradients.accumulate(inputs, labels)
            grad_norm = clip_gradients(run.stages, config.training.max_norm, parallel)
            lr = float(run.optimizers[0].param_groups[0]["lr"])
            for optimizer, scheduler in zip(run.optimizers, run.schedulers, strict=True):
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            step += 1
            step_tokens = inputs.numel() * parallel.dp_size
            run.state.step = step
            run.state.ntokens_seen += step_tokens
            tokens += step_tokens
            last_step = step == config.training.steps
            if last_step or step % config.metrics.log_freq == 0 or step == first + 1:
                mean_loss = sum_over_data(loss, parallel)
                now, total_blocked_s = time.perf_counter(), manager.blocked_s
                row = MetricsRow(
                    step=step,
                    loss=mean_loss,
                    grad_norm=grad_norm.item(),
                    lr=lr,
                    tokens_per_s=tokens / max(now - started, 1e-9),
                    save_blocked_s=total_blocked_s - blocked_s,
                    time=time.time(),
                )
                started, tokens, blocked_s = now, 0, total_blocked_s
                metrics.report(with_timings(row, manager.timings()), parallel.device)
            saved_metrics = partial(_saved_metrics, loss, parallel)
            manager.save(step, last_step=last_step, metrics=saved_metrics)
    except KeyboardInterrupt:
        _log_interrupt(config, step)
        raise


def _saved_metrics(loss: torch.Tensor, parallel: ParallelContext) -> dict[str, float]:
    """Return the metrics to store in a checkpoint. Collective."""
    return {"loss": sum_over_data(loss, parallel)}


def is_finished(config: Config, step: int | None) -> bool:
    """Return whether an earlier run has reached `training.steps`, and log it if so.

    `step` is the last step of that run; None if it is unknown. If `load_step` selects a step before
    `training.steps`, the run trains from there, and this returns False.
    """
    steps = config.training.steps
    if step is None or step < steps or 0 <= config.checkpoint.load_step < steps:
        return False
    logger.info("already at step %d of %d: nothing to do", step, steps)
    return True


def _seed(config: Config) -> None:
    """Seed all random generators, so that runs are reproducible."""
    torch.manual_seed(config.training.seed)
    random.seed(config.training.seed)
    np.random.seed(config.training.seed % 2**32)
    if config.training.deterministic:
        torch.use_deterministic_algorithms(True)


def _open_data(config: Config, parallel: ParallelContext) -> tuple[Tokenizer, Tokens]:
    """Open tokenizer and tokens, on rank 0 first: it writes the token file if there is none.
    Collective."""
    opened, failure = None, None
    if parallel.rank == 0:
        try:
            opened = _tokenizer_and_tokens(config)
        except HoldfastError as error:
            failure = error
    raise_from_rank_0(parallel, failure)
    return opened or _tokenizer_and_tokens(config)


def _tokenizer_and_tokens(config: Config) -> tuple[Tokenizer, Tokens]:
    tokenizer = open_tokenizer(config.model.hf_assets_path)
    return tokenizer, open_tokens(config, tokenizer)


def _published(config: Config, parallel: ParallelContext, vocab_size: int) -> FollowedModel:
    """Return the model to train. Check the settings again with the model's flavor, since the
    `config.json` that the model follows may tie weights, which a pipeline does not support."""
    published = followed_model(config, vocab_size)
    config.check(parallel.world_size, published.flavor)
    return published


def _vocab_size(config: Config, tokenizer: Tokenizer) -> int:
    size = config.model.shape.vocab_size or tokenizer.vocab_size
    if tokenizer.vocab_size > size:
        raise UsageError(
            f"the embedding of `model.flavor` {config.model.flavor} has {size} rows, fewer than "
            f"the tokens of the tokenizer in `model.hf_assets_path` {config.model.hf_assets_path}: "
            f"{tokenizer.vocab_size}"
        )
    return size


def _log_start(
    config: Config, parallel: ParallelContext, stages: Sequence[nn.Module], tokens: Tokens
) -> None:
    count = num_parameters(stages, parallel)
    degrees = config.parallelism.degrees(parallel.world_size)
    logger.info("%s: %s", config.job.description, Path(config.job.dump_folder).absolute())
    logger.info(
        "%s %s, %s parameters; %d x %s (%s); %s tokens of data",
        config.model.name,
        config.model.flavor,
        f"{count:,}",
        parallel.world_size,
        parallel.device.type.upper(),
        ", ".join(f"{a} {d}" for a, d in degrees.items() if d > 1) or "alone",
        f"{len(tokens.ids):,}",
    )


def _log_interrupt(config: Config, step: int) -> None:
    hint = "./run_train.sh resumes from the newest checkpoint"
    if not config.checkpoint.enable:
        hint = "nothing was saved: `checkpoint.enable` is off"
    logger.warning("interrupted at step %d: %s", step, hint)


def _log_end(run: Run, num_steps: int, seconds: float, goodput: str) -> None:
    training, dp_size = run.config.training, run.parallel.dp_size
    tokens = num_steps * training.batch_per_rank(dp_size) * dp_size * training.seq_len
    logger.info(
        "done: %d steps, %s tokens in %.1f s (%s tokens/s); %s tokens since the start",
        num_steps,
        f"{tokens:,}",
        seconds,
        f"{tokens / seconds:,.0f}",
        f"{run.state.ntokens_seen:,}",
    )
    if run.config.checkpoint.enable:
        logger.info("%s", goodput)
