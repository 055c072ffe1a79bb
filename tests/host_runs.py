"""Training runs of other frameworks, each in a forked child: `python host_runs.py COMMANDS`.

The process imports the frameworks once, and runs no torch operator itself, so that every child may
fork from it. COMMANDS is a JSON list of `[function, arguments]`; the output is the list of exit
statuses.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__)


def run_commands(*commands: tuple[str, dict[str, Any]], timeout_s: float = 300) -> list[int]:
    """Run commands one after the other. Returns the exit status of each; negative for a signal."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    done = subprocess.run(
        [sys.executable, str(HERE), json.dumps(commands)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    statuses: list[int] = json.loads(done.stdout.splitlines()[-1])
    failed = [status for status in statuses if status == 1]
    assert not failed, done.stderr
    return statuses


def kill_at(name: str, *, times: int = 1) -> None:
    """Kill this process when a file of that name is opened for the `times`-th time."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.rename") and Path(str(arguments[0])).name == name:
            seen += 1
            if seen == times:
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
    kind: str = "trainer",
    result: str | None = None,
    **options: Any,
) -> None:
    """Train a small Llama by transformers' Trainer, or SFT or DPO by TRL's with an adapter.

    `plain`: without Holdfast. `kill`: name of the file at whose `times`-th opening to die.
    `result`: file for the final weights.
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
    if kill is not None:
        kill_at(kill, times=times)
    trainer = cls(model=model, args=settings_class(**settings), **arguments)
    trainer.train(resume_from_checkpoint=resume)
    if result is not None:
        state = trainer.model.state_dict()
        torch.save({name: tensor.cpu() for name, tensor in state.items()}, result)


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


def _run(function: str, arguments: dict[str, Any]) -> int:
    """Run one command in a forked child. Returns its exit status."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    work: Callable[..., None] = globals()[function]
    try:
        work(**arguments)
    except BaseException:  # noqa: BLE001 - the parent prints it
        traceback.print_exc()
        os._exit(1)
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.WARNING)

    commands = json.loads(sys.argv[1])
    results = [_run(function, arguments) for function, arguments in commands]
    print(json.dumps(results))  # noqa: T201
