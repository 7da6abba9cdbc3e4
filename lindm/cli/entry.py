"""The entry point of `lindm` and of `python -m lindm`.

The imports of the command line take about a tenth of a second. A signal that arrives meanwhile would end the process with a
traceback, or with an exit code that no command has. So SIGTERM and SIGINT are held back first, before any import but this, and
`lindm.io.signals.watch` lets them arrive. What remains is the start of the interpreter.
"""

import signal
import sys


def main() -> int:
    """Run the command line of this process; its exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    if sys.argv[1:2] == ["sft"]:
        from lindm.io.huge_pages import use_huge_pages

        use_huge_pages()
    from lindm.cli.main import main

    return main()
