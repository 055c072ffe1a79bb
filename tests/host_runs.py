"""Training runs of other frameworks, each in a forked child of a process that has imported them.

The process itself runs no torch operator, so that every child may fork from it. Each line of its
input is a JSON list of `[function, arguments]`. The answer is a line with the list of exit
statuses, and the text of all errors.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from warm import python

HERE = Path(__file__)


def run_commands(*commands: tuple[str, dict[str, Any]], timeout_s: float = 300) -> list[int]:
    """Run commands one after the other. Returns the exit status of each; negative for a signal."""
    statuses, errors = run_failing(*commands, timeout_s=timeout_s)
    sys.stderr.write(errors)
    assert 1 not in statuses, errors
    return statuses


def run_failing(
    *commands: tuple[str, dict[str, Any]], timeout_s: float = 300
) -> tuple[list[int], str]:
    """Run commands, some of which may raise. Returns their statuses, and the text of all errors."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{json.dumps(commands)}\n")
    server.stdin.flush()
    alarm = threading.Timer(timeout_s, server.kill)
    alarm.start()
    line = server.stdout.readline()
    alarm.cancel()
    assert line, f"the process of the runs ended, or took longer than {timeout_s} s"
    statuses, errors = json.loads(line)
    return statuses, errors


@cache
def _server() -> subprocess.Popen[str]:
    """The process that forks runs. It ends with this one."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    server = subprocess.Popen(
        [python(frameworks=True), str(HERE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    atexit.register(server.kill)
    return server


def kill_at(name: str, *, times: int = 1) -> None:
    """Kill this process when the `times`-th file of that name, a pattern as in a shell, is opened
    or renamed. To open a file again does not count: a thread does that to sync it."""
    seen = set()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename") and fnmatchcase(Path(str(arguments[0])).name, name):
            seen.add((event, str(arguments[0])))
            if len(seen) == times:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def train_by_trainer(
    out: str,
    *,
    steps: int = 6,
    plain: bool = False,
    resume: Any = None,
    kill: str | None = None,
    times: int = 1,
    rank_killed: int = 0,
    limit: int | None = None,
    dies: bool = False,
    kind: str = "trainer",
    sharded: bool = False,
    saves_model: bool = False,
    result: str | None = None,
    **options: Any,
) -> None:
    """Train a small Llama by transformers' Trainer, or SFT or DPO by TRL's with an adapter.

    `plain`: without Holdfast. `kill`: name of the file at whose `times`-th opening to die.
    `limit`: largest file that steps 3 and 4 may write; `dies`: the process is killed there.
    `sharded`: by FSDP2. `saves_model`: call `save_model` in the end. `result`: file for the final
    weights.
    """
    import torch
    import transformers

    import holdfast

    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = transformers.LlamaForCausalLM(config)
    settings: dict[str, Any] = {
        "output_dir": out,
        "max_steps": steps,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": 1,
        **options,
    }
    tokens = torch.randint(0, 128, (32, 16), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    base: Any = transformers.Trainer
    arguments: dict[str, Any] = {"train_dataset": rows}
    settings_class: Any = transformers.TrainingArguments
    if "eval_strategy" in options:
        arguments["eval_dataset"] = rows[:4]
    if kind != "trainer":
        base, settings_class, arguments = _by_trl(kind, tokens)
    mixin: Any = holdfast.hosts.transformers.HoldfastMixin
    cls = base if plain else type("SafeTrainer", (mixin, base), {})
    if kill is not None and int(os.environ.get("RANK", "0")) == rank_killed:
        kill_at(kill, times=times)

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            if result is not None:
                note_start(result, state.global_step)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            if limit is not None and state.global_step == 2 and args.process_index == rank_killed:
                limit_files(limit, dies=dies)

    args = settings_class(**settings)
    trainer = cls(model=model, args=args, callbacks=[Watch()], **arguments)
    if sharded:
        shard_on_cpu(trainer.accelerator)
        trainer.is_fsdp_enabled = True
    trainer.train(resume_from_checkpoint=resume)
    if saves_model:
        trainer.save_model(out)  # As the scripts of TRL do.
    if result is not None:
        keep_weights(trainer.accelerator.unwrap_model(trainer.model), result)


def _by_trl(kind: str, tokens: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Trainer, settings and arguments for a run of TRL with an adapter of PEFT."""
    import peft
    import trl as trl_module
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    trl: Any = trl_module
    words = {f"w{number}": number for number in range(126)} | {"<unk>": 126, "<pad>": 127}
    words_only = Tokenizer(WordLevel(words, unk_token="<unk>"))
    words_only.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words_only, unk_token="<unk>", pad_token="<pad>", eos_token="<unk>"
    )
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    texts = [" ".join(f"w{int(token)}" for token in row) for row in tokens]
    common = {"peft_config": adapter, "processing_class": tokenizer}
    if kind == "sft":
        return (
            trl.SFTTrainer,
            trl.SFTConfig,
            {
                "train_dataset": Dataset.from_list([{"text": text} for text in texts]),
                **common,
            },
        )
    pairs = [
        {"prompt": text[:20], "chosen": text[20:40], "rejected": text[40:60]} for text in texts
    ]
    return trl.DPOTrainer, trl.DPOConfig, {"train_dataset": Dataset.from_list(pairs), **common}


def limit_files(nbytes: int, *, dies: bool) -> None:
    """Let every write beyond this size of a file fail, as on a full disk, or kill the process."""
    if dies:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))


def train_by_accelerate(
    out: str,
    *,
    saves: int = 3,
    plain: bool = False,
    resume: str | bool = False,
    kill: str | None = None,
    times: int = 1,
    rank_killed: int = 0,
    limit: int | None = None,
    dies: bool = False,
    total_limit: int | None = None,
    named: bool = True,
    sharded: bool = False,
    result: str | None = None,
) -> None:
    """A loop with Accelerate that saves after every 4 steps.

    `named`: automatic names. `resume`: True for `load_state()`, or a path. `sharded`: by FSDP2.
    """
    import accelerate
    import torch
    from accelerate.utils import ProjectConfiguration

    import holdfast

    project = ProjectConfiguration(
        project_dir=out, automatic_checkpoint_naming=named, total_limit=total_limit
    )
    accelerator: Any = accelerate.Accelerator(cpu=True, project_config=project)
    if sharded:
        shard_on_cpu(accelerator)
    if not plain:
        accelerator = holdfast.hosts.accelerate.prepare(accelerator, folder=None if named else out)
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Linear(64, 16))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    done = _Done()
    accelerator.register_for_checkpointing(done)
    if resume:
        accelerator.load_state(*([resume] if isinstance(resume, str) else []))
    if result is not None:
        note_start(result, 4 * done.saves)
    if kill is not None and accelerator.process_index == rank_killed:
        kill_at(kill, times=times)
    rows = torch.randn((8, 16), generator=torch.Generator().manual_seed(1))
    while done.saves < saves:
        if limit is not None and done.saves == 1 and accelerator.process_index == rank_killed:
            limit_files(limit, dies=dies)
        for batch in rows.split(2):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            dropped = torch.nn.functional.dropout(batch, 0.1)
            accelerator.backward((model(dropped) - batch).square().mean())
            optimizer.step()
        done.saves += 1
        accelerator.save_state(*([] if named else [f"{out}/epoch_{done.saves}"]))
    if result is not None:
        keep_weights(accelerator.unwrap_model(model), result)


def shard_on_cpu(accelerator: Any) -> None:
    """Let Accelerate shard models by FSDP2, which it otherwise does on accelerators only."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="no_wrap",
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    # Accelerate copies these members into every new state.
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


class _Done:
    """Object registered with an Accelerator."""

    def __init__(self) -> None:
        self.saves = 0

    def state_dict(self) -> dict[str, int]:
        return {"saves": self.saves}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.saves = state["saves"]


def damage(file: str, how: str) -> None:
    """Flip a bit in the middle of a file, or cut off its end."""
    data = bytearray(Path(file).read_bytes())
    data[len(data) // 2] ^= 1
    Path(file).write_bytes(data if how == "flipped" else data[:-1000])


def move(source: str, target: str) -> None:
    """Give a folder another name. A folder of that name is deleted."""
    shutil.rmtree(target, ignore_errors=True)
    Path(source).rename(target)


def copy(source: str, target: str) -> None:
    """Copy a file or a folder with its times."""
    if Path(source).is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)


def note_start(result: str, step: int) -> None:
    """Note the step at which a run has begun or resumed."""
    Path(result).with_suffix(".start").write_text(str(step))


def keep_weights(model: Any, file: str) -> None:
    import torch

    state = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(state, file)


def _run(function: str, arguments: dict[str, Any]) -> int:
    """Run one command in forked children, one by default, with the variables `environment`. Returns
    the exit status: that of the first rank that failed, after which the others are killed.

    `hosts`: each rank has a host name and a temporary folder of its own. Needs root."""
    ranks = arguments.pop("ranks", 1)
    environment = arguments.pop("environment", {})
    hosts = arguments.pop("hosts", False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = set()
    for rank in range(ranks):
        child = os.fork()
        if not child:
            os.environ |= environment
            tempfile.tempdir = None
            if hosts:
                be_a_host(rank)
            if ranks > 1:
                # As torchrun sets them.
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks),
                    "GROUP_RANK": "0",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "TORCHELASTIC_RUN_ID": "run",
                }
            lightning = import_module("host_lightning")
            _work(globals().get(function) or getattr(lightning, function), arguments)
        children.add(child)
    first = 0
    while children:
        ended, status = os.wait()
        children.discard(ended)
        if not first and status:
            first = os.waitstatus_to_exitcode(status)
            for child in children:
                os.kill(child, signal.SIGKILL)
    return first


def be_a_host(rank: int) -> None:
    """Give this process a host name and a temporary folder of its own."""
    clone_newuts = 0x04000000
    assert ctypes.CDLL(None, use_errno=True).unshare(clone_newuts) == 0, os.strerror(
        ctypes.get_errno()
    )
    socket.sethostname(f"host{rank}")
    os.environ["TMPDIR"] += f"/host{rank}"
    Path(os.environ["TMPDIR"]).mkdir(exist_ok=True)


def _work(work: Callable[..., None], arguments: dict[str, Any]) -> None:
    """Work in a child, and end it."""
    try:
        work(**arguments)
    except BaseException:  # noqa: BLE001 - the parent prints it
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # As at the end of a process: the last checkpoints may not be durable yet.
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(0)


def _serve() -> None:
    """Import the modules of the frameworks, then run the commands of each line of the input."""
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.WARNING)
    for noisy in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(f"{noisy}.utilities").setLevel(logging.WARNING)
    for name in ("transformers.trainer", "accelerate", "pytorch_lightning", "lightning_fabric"):
        if find_spec(name.partition(".")[0]) is not None:
            import_module(name)
    import_module("torch.distributed.checkpoint.state_dict")
    if "transformers" in sys.modules:
        # A process that this one was forked from may have imported it without this setting.
        sys.modules["transformers"].logging.set_verbosity_error()
    # The answers alone go to the real output.
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        with tempfile.TemporaryFile() as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            statuses = [_run(function, arguments) for function, arguments in json.loads(line)]
            log.seek(0)
            errors = log.read().decode(errors="replace")
        answers.write(f"{json.dumps([statuses, errors])}\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
