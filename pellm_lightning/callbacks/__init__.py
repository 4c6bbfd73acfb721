"""The Lightning callbacks: FederatedAveraging and what it is made of, drift corrections, DP-SGD."""
