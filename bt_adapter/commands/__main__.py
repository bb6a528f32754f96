"""Run the command line as a module: ``python -m bt_adapter.commands``, which is the form that torchrun takes."""

import sys

from bt_adapter.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
