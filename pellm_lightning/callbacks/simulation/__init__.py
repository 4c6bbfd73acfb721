"""Simulations in a Lightning fit: the parties' turns at the one module, and their data."""
