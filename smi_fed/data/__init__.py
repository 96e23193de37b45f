"""Images and how clients share them.

Nothing here needs a network but `hub_images`, which asks flwr-datasets for a hub data set.
"""

from smi_fed.data.config import EMBEDDED, SCHEMES, SOURCES, DataConfig
from smi_fed.data.embedded import digits, shapes
from smi_fed.data.folders import folder_images
from smi_fed.data.hub import from_datasets, hub_images
from smi_fed.data.images import ImageSet
from smi_fed.data.partitions import partition
from smi_fed.data.sources import load_images

__all__ = [
    "EMBEDDED", "SCHEMES", "SOURCES", "DataConfig", "ImageSet", "digits", "folder_images", "from_datasets",
    "hub_images", "load_images", "partition", "shapes",
]  # fmt: skip
