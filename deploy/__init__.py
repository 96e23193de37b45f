"""From nothing to a federation over several machines; docs/machines.md is the recipe."""
