"""The fast tier: checkpoints on the disks of the hosts, which are copied to the durable folder."""
