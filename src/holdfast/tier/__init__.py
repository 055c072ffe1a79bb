"""The fast tier: checkpoints on the disks of the hosts. Some are copied to the run's folder."""
