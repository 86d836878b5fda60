"""`python -m cuattn`: see cli.py."""

import sys

from cuattn.cli import main

sys.exit(main())
