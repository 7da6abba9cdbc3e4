"""The command line: one file per command, `main` to dispatch them, `option_parser` to parse their options."""
