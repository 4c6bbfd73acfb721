"""What a Trainer is to a party: process group, files of its own, metrics, checkpoints to resume."""
