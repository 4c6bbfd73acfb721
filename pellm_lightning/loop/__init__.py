"""The federated loop: rounds within one party's training, whatever library runs it."""
