"""`python -m simulations.throughput`."""

import sys

from simulations.throughput import main

sys.exit(main())
