"""`python -I -m ambi.engine`, see daemon.py."""

import sys

from ambi.engine.daemon import main

sys.exit(main(sys.argv[1:]))
