"""Entry point of `python -m holdfast.cli`, for when the `holdfast` command is not on the PATH."""

import sys

from holdfast.cli.main import main

sys.exit(main())
