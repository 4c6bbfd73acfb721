"""Front ends other than Lightning: loops of one's own, and transformers' Trainer."""
