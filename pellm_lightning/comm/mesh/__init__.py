"""Mesh: collectives over own connections, one per pair of parties, plain or TLS."""
