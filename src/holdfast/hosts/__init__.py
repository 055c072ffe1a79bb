"""Holdfast inside other frameworks: one module each, which imports its framework on use.

transformers   `HoldfastMixin` for `Trainer` and the trainers of TRL
accelerate     `prepare` for an `Accelerator`
lightning      `HoldfastIO` and `ModelParallel` for Lightning and Fabric
torchtitan     `CheckpointManager` for TorchTitan
"""
