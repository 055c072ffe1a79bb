"""Where tensors meet bytes: plan, stage, write, commit; reshard, read."""
