"""The command line: one file per command, `main` to dispatch them, `arguments` to parse their options."""
