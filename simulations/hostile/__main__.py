"""`python -m simulations.hostile`."""

import sys

from simulations.hostile import main

sys.exit(main())
