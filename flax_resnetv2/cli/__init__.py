"""The commands: words in, exit codes out."""
