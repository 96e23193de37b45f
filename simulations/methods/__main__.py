"""`python -m simulations.methods`."""

import sys

from simulations.methods import main

sys.exit(main())
