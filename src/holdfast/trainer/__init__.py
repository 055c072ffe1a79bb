"""The reference training run: Llama- and Qwen3-shaped models, N-D parallel, saved and resumed.

    config     every setting, its default and its meaning      arguments  TOML and command line
    flavors    the sizes of the models                         model      the network itself
    moe        its blocks of experts                           weights    initial values
    parallel   processes, meshes, sharding                     context    attention across ranks
    pipeline   stages and their schedule                       gradients  forward and backward
    corpus     text to token files                             data       tokens to batches
    optim      optimizers, schedules, clipping                 metrics    what a run reports
    train      the loop                                        worker     one process of a run
    launch     several workers on this machine

Nothing is imported here: `config`, `arguments` and `flavors` answer `--help` without torch.
"""
