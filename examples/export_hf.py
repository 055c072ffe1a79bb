"""Save a transformers model, then export the checkpoint to a folder that `from_pretrained` opens.

python export_hf.py
"""

import subprocess
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import holdfast


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    config.save_pretrained("outputs/assets")  # config.json; a real folder also has a tokenizer
    holdfast.save("outputs/trained", {"model": model}, overwrite=True)

    # The same as: holdfast convert outputs/trained outputs/exported --to hf --hf-assets ...
    options = ["--to", "hf", "--hf-assets", "outputs/assets", "--overwrite"]
    command = [sys.executable, "-m", "holdfast", "convert", "outputs/trained", "outputs/exported"]
    subprocess.run([*command, *options], check=True)

    exported = LlamaForCausalLM.from_pretrained("outputs/exported")
    tokens = torch.arange(8)[None]
    assert torch.equal(model(tokens).logits, exported(tokens).logits)
    print("the exported model gives the same logits")


if __name__ == "__main__":
    main()
