"""The command line: LightningCLI with the federation among its arguments, and commands of its own."""
