"""Signed evidence: round certificates, their chain in a file, and its verification; no torch."""
