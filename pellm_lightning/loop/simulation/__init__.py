"""Simulation: many parties that a few processes hold in turn, with the engine of all other rounds."""
