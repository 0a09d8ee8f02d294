"""The process and the machine it runs on: memory, files, signals, other processes."""
