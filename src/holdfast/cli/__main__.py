"""`python -m holdfast.cli`: the `holdfast` command where it is not on the PATH."""

import sys

from holdfast.cli.main import main

sys.exit(main())
