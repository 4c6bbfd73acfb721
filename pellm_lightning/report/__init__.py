"""What people see of a federation: while it runs, and afterwards."""
