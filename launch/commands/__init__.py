"""The commands of `diptych`, a file per group: arguments in, exit code out. cli.py puts them together."""
