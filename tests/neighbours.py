"""Checkpoints of other libraries, as the skills for these libraries describe them. The libraries
themselves write small ones."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from hf_folders import LLAMA, hf_tensors, save_folder
from processes import run_processes
from warm import python

GOLDEN = Path(__file__).parent / "golden"

SHARDED = """
import sys, torch, pytorch_lightning as pl
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 4))

    def configure_model(self):
        for layer in self.net:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=2, **quiet)
trainer.fit(Net(), torch.utils.data.DataLoader(torch.randn(16, 16), batch_size=4))
trainer.save_checkpoint(sys.argv[1])
"""


LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": {"model_type": "llama", "vocab_size": 8},
    "vision_config": {"model_type": "clip_vision_model"},
}
LLAVA_NAMES = (
    "model.vision_tower.vision_model.embeddings.position_embedding.weight",
    "model.multi_modal_projector.linear_1.weight",
    "model.language_model.embed_tokens.weight",
    "lm_head.weight",
)
UNET = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.35.0"}


def save_by_accelerate(rank: int, size: int, folder: str) -> None:
    """Save a whole model by `save_state`, and a sharded one by the functions that `save_state`
    calls under FSDP2. Accelerate turns on FSDP2 only on GPUs, so the test shards the model itself.
    """
    import torch
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import save_fsdp_model, save_fsdp_optimizer
    from torch.distributed.fsdp import fully_shard

    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    layers = (torch.nn.Linear(16, 32), torch.nn.Dropout(0.1), torch.nn.Linear(32, 4))
    model = torch.nn.Sequential(*layers)
    accelerator.prepare(model)
    accelerator.save_state(f"{folder}/state")
    for layer in layers:
        fully_shard(layer)
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 16)).square().mean().backward()
    optimizer.step()
    save_fsdp_model(plugin, accelerator, model, f"{folder}/sharded")
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, f"{folder}/sharded")


def prepare(name: str, folder: Path) -> None:
    """Make the files below a folder that the skill `name` expects."""
    outputs = folder / "outputs"
    if name == "accelerate":
        run_processes(2, save_by_accelerate, str(outputs))
    elif name == "pytorch-lightning":
        launch = [python(), "-m", "torch.distributed.run", "--standalone"]
        (folder / "sharded.py").write_text(SHARDED)
        work = ["--nproc_per_node", "2", "sharded.py", str(outputs / "sharded.ckpt")]
        ran_unless_torch_aborts([*launch, *work], cwd=folder).check_returncode()
    elif name in ("peft", "trl-fine-tuning"):
        save_folder(folder / "path/to/hf", LLAMA, hf_tensors(LLAMA))
        save_tokenizer(folder / "path/to/hf")


def prepare_page(page: str, folder: Path) -> None:
    """Make the files below a folder that a page of the skill `holdfast` expects."""
    if page == "references/multimodal.md":
        save_folder(
            folder / "path/to/llava", LLAVA, {name: torch.ones(8, 8) for name in LLAVA_NAMES}
        )
    elif page == "references/diffusers.md":
        unet = save_folder(
            folder / "pipeline/unet", UNET, {"conv_in.weight": torch.ones(4, 3, 3, 3)}
        )
        (unet / "model.safetensors").rename(unet / "diffusion_pytorch_model.safetensors")
    elif page == "references/rl.md":
        config = {**LLAMA, "architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
        tensors = hf_tensors(LLAMA)
        tensors["score.weight"] = tensors.pop("lm_head.weight")[:1]
        save_folder(folder / "path/to/reward", config, tensors)
    elif page == "references/megatron.md":
        shutil.copytree(GOLDEN / "megatron", folder / "megatron")
        save_folder(folder / "exported", LLAMA, hf_tensors(LLAMA))


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", "some", "words", "to", "learn"]
    model = models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)


def ran_unless_torch_aborts(command: Any, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a command, and once more if torch aborted a worker of torchrun.

    On a loaded machine about one of ten jobs over gloo ends in this abort, even if the script uses
    only torch.
    """
    for _ in range(2):
        ran = subprocess.run(command, text=True, capture_output=True, **settings)
        if "terminate called without an active exception" not in ran.stderr:
            break
    return ran
