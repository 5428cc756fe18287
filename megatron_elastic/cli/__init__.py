"""The command line: one module a subcommand, each with `HELP`, `add_arguments(parser)` and `run(arguments) -> int`.

These modules import nothing heavy: `--help` answers at once, and what a command needs is imported when it runs.
"""
