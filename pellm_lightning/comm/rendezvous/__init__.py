"""Rendezvous of separate jobs: a key-value server, and its clients."""
