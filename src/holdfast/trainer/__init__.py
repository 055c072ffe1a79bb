"""The reference training run: Llama- and Qwen3-shaped models with N-D parallelism.

    config     settings with their defaults        arguments  settings from TOML and command line
    titan      TorchTitan's settings
    model      the network                         moe        its mixture of experts
    weights    initial weights                     parallel   process group, meshes, sharding
    context    attention across ranks              pipeline   stages and their schedule
    gradients  forward and backward                corpus     text to token files
    data       token files to batches              optim      optimizers, schedules, clipping
    metrics    log, `metrics.jsonl`, TensorBoard   train      the training loop
    worker     one process of a run                launch     several workers on this machine

This module imports nothing: `--help` and wrong settings are answered without importing torch.
"""
