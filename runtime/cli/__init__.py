"""The command line: a file per command, named as its command."""
