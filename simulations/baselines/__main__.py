"""`python -m simulations.baselines`."""

import sys

from simulations.baselines import main

sys.exit(main())
