"""torchtune 0.6.1, in a separate environment: it needs an older torchao than the other tools."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from holdfast.convert.convert import convert
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.hf.flavors import MODELS
from holdfast.saving.save import save
from holdfast.trainer.model import Transformer

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-torchtune"
WANTED = ("torchtune==0.6.1", "torchao==0.15.0")


@pytest.fixture(scope="module")
def torchtune() -> Path:
    """Python of an environment with torchtune and the torch of this one, created once."""
    python = ENVIRONMENT / "bin/python"
    if not (ENVIRONMENT / "made").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
        there = subprocess.run([python, "-c", purelib], text=True, capture_output=True, check=True)
        here = Path(there.stdout.strip()) / "torch_of_the_tests.pth"
        at = {sysconfig.get_path("purelib"), str(Path(torch.__file__).parents[1])}
        here.write_text("\n".join(at))
        subprocess.run([python, "-m", "pip", "install", "--quiet", *WANTED], check=True)
        (ENVIRONMENT / "made").touch()
    return python


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_torchtune_checkpointer_loads_a_model_only_checkpoint(
    torchtune: Path, tmp_path: Path
) -> None:
    """G10: a small Llama has the same logits as before it was saved, loaded from a checkpoint, a
    `.pt` file and a Hugging Face folder. Method: `torchtune_logits.py` loads each by its
    checkpointer."""
    flavor = MODELS["llama3"]["debugmodel"]
    torch.manual_seed(5)
    model = Transformer(flavor, vocab_size=300, seq_len=32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.05 + (parameter.dim() == 1))
    save(tmp_path / "step", model.state_dict())
    named = {"model_name": "llama3", "model_flavor": "debugmodel"}
    for name, options in (
        ("model.pt", ConvertOptions(to="torch", model_only=True)),
        ("hf", ConvertOptions(to="hf", **named)),  # type: ignore[arg-type]
    ):
        planned = plan(str(tmp_path / "step"), options)
        convert(planned, str(tmp_path / name))
    tokens = torch.randint(0, 300, (2, 32))
    sizes = {
        "vocab_size": 300,
        "num_layers": flavor.num_layers,
        "num_heads": flavor.num_heads,
        "num_kv_heads": flavor.num_kv_heads,
        "embed_dim": flavor.dim,
        "max_seq_len": 32,
        "intermediate_dim": flavor.hidden_dim,
        "norm_eps": flavor.norm_eps,
        "rope_base": int(flavor.rope_theta),
    }
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    torch.save({"sizes": sizes, "tokens": tokens, "shapes": shapes}, tmp_path / "given.pt")
    script = Path(__file__).with_name("torchtune_logits.py")
    ran = subprocess.run([torchtune, script, tmp_path], text=True, capture_output=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    with torch.no_grad():
        wanted = model(tokens)
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert len(found) == 3
    for name, logits in found.items():
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5, msg=name)
