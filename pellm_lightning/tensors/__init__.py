"""Tensors of a module: which of them federate, as one flat buffer, digests and snapshots."""
