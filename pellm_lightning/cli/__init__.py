"""The command line: LightningCLI with the federation among its arguments, and the commands beside it."""
