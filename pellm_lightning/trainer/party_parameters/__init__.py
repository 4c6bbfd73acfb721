"""Parameters of a party as whole tensors at its leader, whatever shards them inside the party."""
