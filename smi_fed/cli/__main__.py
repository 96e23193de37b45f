"""`python -m smi_fed.cli`."""

from smi_fed.cli import main

main()
