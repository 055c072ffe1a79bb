"""The reference training run: a Llama-shaped model, N-D parallel, that saves and resumes.

    config     every setting, its default and its meaning      arguments  TOML and command line
    flavors    the sizes of the models                         model      the network itself
    parallel   processes, mesh, sharding                       weights    initial values
    corpus     text to token files                             data       tokens to batches
    optim      optimizers, schedules, clipping                 metrics    what a run reports
    train      the loop                                        worker     one process of a run
    launch     several workers on this machine

Nothing is imported here: `config`, `arguments` and `flavors` answer `--help` without torch.
"""
