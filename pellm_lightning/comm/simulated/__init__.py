"""Communicators of simulated parties, which the processes of a launch hold as threads."""
