"""The `householder` command: flags in; `householder.train` and `.recipes` do the work."""

from householder.cli.commands import app, main

__all__ = ["app", "main"]
