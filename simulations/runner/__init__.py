"""What every study has in common; a study says its cells, how one is measured, its table and its figure.

It knows neither Flower nor Ray, and Hydra only when settings are composed.
"""

from simulations.runner.ledger import Line, Lines
from simulations.runner.loop import Outcome, command, run
from simulations.runner.study import Cell, Page, Study, Table, asked, groups, seeds_of

__all__ = [
    "Cell",
    "Line",
    "Lines",
    "Outcome",
    "Page",
    "Study",
    "Table",
    "asked",
    "command",
    "groups",
    "run",
    "seeds_of",
]
