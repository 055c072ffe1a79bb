"""The training loop, from top to bottom."""

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

from holdfast.errors import HoldfastError, UsageError
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.manager import CheckpointManager
from holdfast.storage.opening import local_path
from holdfast.trainer.config import Config
from holdfast.trainer.corpus import Tokenizer, Tokens, open_tokenizer, open_tokens
from holdfast.trainer.data import DataLoader
from holdfast.trainer.gradients import Gradients
from holdfast.trainer.hub import hf_model
from holdfast.trainer.metrics import Clock, Metrics, MetricsRow
from holdfast.trainer.optim import (
    build_optimizers,
    build_schedulers,
    clip_gradients,
    follow_schedules,
    restored_otherwise,
)
from holdfast.trainer.parallel import (
    Place,
    build_model,
    first_then_all,
    num_parameters,
    sum_over_data,
)

logger: logging.Logger = logging.getLogger("holdfast.trainer")


@dataclass(slots=True)
class TrainState:
    """What the loop itself counts, and a checkpoint keeps, under TorchTitan's names."""

    step: int = 0
    """Optimizer steps done."""

    ntokens_seen: int = 0
    """Tokens trained on so far, over all ranks."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values, the same on every rank."""
        return {"step": self.step, "ntokens_seen": self.ntokens_seen}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` counted."""
        self.step = int(state_dict["step"])
        self.ntokens_seen = int(state_dict["ntokens_seen"])


@dataclass(frozen=True, slots=True)
class Run:
    """All that a run is made of."""

    config: Config
    """Its settings."""

    place: Place
    """Where this process stands among all that take part."""

    model_parts: list[nn.Module]
    """What this process holds of the model."""

    optimizers: list[torch.optim.Optimizer]
    """One for each part."""

    gradients: Gradients
    """Takes samples through the parts."""

    schedulers: list[LambdaLR]
    """One for each optimizer."""

    loader: DataLoader
    """This process's share of the data."""

    state: TrainState
    """What the loop itself counts."""

    vocab_size: int
    """Rows of the embedding."""


def train(config: Config, place: Place) -> None:
    """Train the configured model to its last step, resuming where an earlier run left off.

    Collective. Raises HoldfastError on every rank where the settings, the data or a checkpoint do
    not allow it.
    """
    # First, before the data make a folder of a name that is a URL.
    dump_folder, checkpoint_folder = _folders(config)
    if config.checkpoint.create_seed_checkpoint:
        create_seed(config, place)
        return
    run = build_run(config, place)
    with CheckpointManager(
        checkpoint_folder,
        model=run.model_parts,
        optimizers=run.optimizers,
        lr_schedulers=run.schedulers,
        dataloader=run.loader,
        states={"train_state": run.state},
        # Where it is off no key has an effect, which the start of the run has said.
        config=config.checkpoint if config.checkpoint.enable else CheckpointConfig(),
        hub=hf_model(config, run.vocab_size),
    ) as manager:
        if is_finished(config, manager.final_step()):
            return
        step = manager.load(config.checkpoint.load_step)
        if is_finished(config, step):
            return
        follow_schedules(run.schedulers)
        for line in restored_otherwise(run.optimizers, config.optimizer):
            logger.warning(
                "%s (--checkpoint.exclude_from_loading optimizer,lr_scheduler takes that, and "
                "starts the optimizer afresh)",
                line,
            )
        logger.info("training from step %d to %d", step, config.training.steps)
        metrics = Metrics(config.metrics, dump_folder, first_rank=place.rank == 0, step=step)
        started = time.perf_counter()
        try:
            take_steps(run, manager, metrics, first=step)
        finally:
            metrics.close(manager.timings())
    _log_end(run, config.training.steps - step, time.perf_counter() - started, manager.goodput())


def _folders(config: Config) -> tuple[Path, str]:
    """The folder that everything of a run goes to, and that of its checkpoints.

    Raises:
        UsageError: one of them is a URL.
    """
    dump_folder = local_path(config.job.dump_folder)
    local_path(config.checkpoint.folder or ".")  # As it is given: a `~` inside of a path is a name.
    return Path(dump_folder), local_path(os.path.join(dump_folder, config.checkpoint.folder))  # noqa: PTH118 - keeps `//`


def create_seed(config: Config, place: Place) -> None:
    """Save the whole model's initial weights as step 0; no data are needed.

    Raises:
        ExistsError: the folder holds steps already.
    """
    tokenizer = open_tokenizer(config.model.hf_assets_path)
    model_parts = build_model(config, place, _vocab_size(config, tokenizer))
    _, folder = _folders(config)
    checkpoint = replace(config.checkpoint, on_save_error="raise", async_mode="disabled")
    with CheckpointManager(folder, model=model_parts, config=checkpoint) as manager:
        manager.save_seed()


def build_run(config: Config, place: Place) -> Run:
    """Everything at its start, before a checkpoint is loaded. Collective."""
    _seed(config)
    config.check(place.world_size)
    tokenizer, tokens = _open_data(config, place)
    vocab_size = _vocab_size(config, tokenizer)
    model_parts = build_model(config, place, vocab_size)
    optimizers = build_optimizers(model_parts, config.optimizer)
    schedulers = build_schedulers(optimizers, config.lr_scheduler, config.training.steps)
    loader = DataLoader(
        tokens,
        seq_len=config.training.seq_len,
        seed=config.training.seed,
        batch_per_rank=config.training.batch_per_rank(place.dp_size),
        dp_rank=place.dp_rank,
        dp_size=place.dp_size,
    )
    _log_start(config, place, model_parts, tokens)
    gradients = Gradients(config, place, model_parts)
    return Run(
        *(config, place, model_parts, optimizers, gradients, schedulers, loader),
        *(TrainState(), vocab_size),
    )


def take_steps(run: Run, manager: CheckpointManager, metrics: Metrics, *, first: int) -> None:
    """Train from step `first` to the last, reporting and saving on the way. Collective."""
    config, place, step, clock = run.config, run.place, first, Clock()
    try:
        while step < config.training.steps:
            inputs, labels = next(run.loader)
            loss = run.gradients.accumulate(inputs, labels)
            grad_norm = clip_gradients(run.model_parts, config.training.max_norm, place)
            lr = float(run.optimizers[0].param_groups[0]["lr"])
            for optimizer, scheduler in zip(run.optimizers, run.schedulers, strict=True):
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            step += 1
            step_tokens = inputs.numel() * place.dp_size
            run.state.step = step
            run.state.ntokens_seen += step_tokens
            clock.tokens += step_tokens
            last_step = step == config.training.steps
            if last_step or step % config.metrics.log_freq == 0 or step == first + 1:
                mean_loss, norm = sum_over_data(loss, place), grad_norm.item()
                pace = clock.lap(manager.blocked_s)
                row = MetricsRow(step, mean_loss, norm, lr, *pace, time.time())
                metrics.report(row.with_more(manager.timings()), place.device)
            measured = partial(_measured, loss, place)
            manager.save(step, last_step=last_step, metrics=measured)
    except KeyboardInterrupt:
        _log_interrupt(config, step)
        raise


def _measured(loss: torch.Tensor, place: Place) -> dict[str, float]:
    """What a checkpoint keeps of the step it is saved after. Collective."""
    return {"loss": sum_over_data(loss, place)}


def is_finished(config: Config, step: int | None) -> bool:
    """Whether an earlier run came as far as this one is to go, which the log then says.

    `step` is where it came to; None where that is not known.
    """
    steps = config.training.steps
    if step is None or step < steps or 0 <= config.checkpoint.load_step < steps:
        return False
    logger.info("already at step %d of %d: nothing to do", step, steps)
    return True


def _seed(config: Config) -> None:
    """Every generator that a checkpoint keeps, so that a run is the same each time."""
    torch.manual_seed(config.training.seed)
    random.seed(config.training.seed)
    np.random.seed(config.training.seed % 2**32)
    if config.training.deterministic:
        torch.use_deterministic_algorithms(True)


def _open_data(config: Config, place: Place) -> tuple[Tokenizer, Tokens]:
    """Rank 0 makes the token file where it has to be made; then all open it. Collective."""
    opened, failure = None, None
    if place.rank == 0:
        try:
            opened = _tokenizer_and_tokens(config)
        except HoldfastError as error:
            failure = error
    first_then_all(place, failure)
    return opened or _tokenizer_and_tokens(config)


def _tokenizer_and_tokens(config: Config) -> tuple[Tokenizer, Tokens]:
    tokenizer = open_tokenizer(config.model.hf_assets_path)
    return tokenizer, open_tokens(config, tokenizer)


def _vocab_size(config: Config, tokenizer: Tokenizer) -> int:
    size = config.model.shape.vocab_size or tokenizer.vocab_size
    if tokenizer.vocab_size > size:
        raise UsageError(
            f"the tokenizer in `model.hf_assets_path` {config.model.hf_assets_path} has "
            f"{tokenizer.vocab_size} tokens, more than `model.flavor` {config.model.flavor} has "
            f"rows for them: {size}"
        )
    return size


def _log_start(
    config: Config, place: Place, model_parts: Sequence[nn.Module], tokens: Tokens
) -> None:
    count = num_parameters(model_parts, place)
    degrees = config.parallelism.degrees(place.world_size)
    logger.info("%s: %s", config.job.description, Path(config.job.dump_folder).absolute())
    logger.info(
        "%s %s, %s parameters; %d x %s (%s); %s tokens of data",
        config.model.name,
        config.model.flavor,
        f"{count:,}",
        place.world_size,
        place.device.type.upper(),
        ", ".join(f"{a} {d}" for a, d in degrees.items() if d > 1) or "alone",
        f"{len(tokens.ids):,}",
    )


def _log_interrupt(config: Config, step: int) -> None:
    further = "./run_train.sh goes on from the newest checkpoint"
    if not config.checkpoint.enable:
        further = "nothing was saved: `checkpoint.enable` is off"
    logger.warning("interrupted at step %d: %s", step, further)


def _log_end(run: Run, num_steps: int, seconds: float, goodput: str) -> None:
    training, dp_size = run.config.training, run.place.dp_size
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
