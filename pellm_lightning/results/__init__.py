"""What comes of a federation: adapters to hand on, and how good they are for whom."""
