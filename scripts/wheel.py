"""What the wheel has beyond the package: the Flower app and its launcher, for `smi-fed demo` and `smi-fed federate`.

In a checkout, and so in an editable install, they lie beside the package.
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

APP = (
    "clients", "conf", "deploy/__init__.py", "deploy/credentials.py", "server", "simulations/__init__.py",
    "simulations/demo.py", "simulations/processes.py", "simulations/superlink.py",
)  # fmt: skip


class AppInside(BuildHookInterface[Any]):
    """Puts the app below `smi_fed/app/`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Hatch's: `version` is `standard` or `editable`."""
        if version == "standard":
            found = {name: f"smi_fed/app/{name}" for name in APP}
            build_data["force_include"] |= found | {"deploy/app.toml": "smi_fed/app/pyproject.toml"}
