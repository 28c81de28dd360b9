"""The command line: a file for each group of commands. Each checks its words and calls what Python users call."""
