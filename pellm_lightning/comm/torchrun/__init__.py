"""The parties of one launch: they meet at the launcher's store, sum over Gloo, and stop together."""
