"""`python -I -m ambi.network.netd`."""

import sys

from ambi.network.netd.server import main

sys.exit(main(sys.argv[1:]))
