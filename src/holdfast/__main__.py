"""Run the `holdfast` command as `python -m holdfast`, for when it is not on the PATH."""

import sys

from holdfast.cli.main import main

sys.exit(main())
