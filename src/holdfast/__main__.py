"""`python -m holdfast`: as `holdfast`, where the command is not on the path."""

import sys

from holdfast.cli.main import main

sys.exit(main())
