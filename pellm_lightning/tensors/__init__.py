"""Tensors of a module: selection of the federated ones, flat buffer, digests and snapshots."""
