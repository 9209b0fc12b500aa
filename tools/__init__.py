"""What a person runs: the command line, one module a command."""
