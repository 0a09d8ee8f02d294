"""One run in one directory: the impure part, with its devices, files and clock."""
