"""Separate jobs: parties die, stall and come back, and every round is everybody's or nobody's."""
