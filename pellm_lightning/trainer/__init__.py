"""Lightning Trainer of one party: its environment, isolation from other parties, resume, metrics."""
