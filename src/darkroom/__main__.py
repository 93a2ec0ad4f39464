"""`python -m darkroom` is the command `darkroom`."""

import sys

from darkroom.cli.main import main

sys.exit(main())
