"""Images and how clients share them.

Nothing here needs a network but `hub_images`, which asks flwr-datasets for a hub data set.
"""

from smi_fed.data.config import EMBEDDED, SCHEMES, SOURCES, DataConfig
from smi_fed.data.embedded import digits, shapes
from smi_fed.data.images import Images, ImageSet
from smi_fed.data.lazy_images import LazyImages
from smi_fed.data.owners import owned_images
from smi_fed.data.partitions import partition
from smi_fed.data.sources import folder_images, from_datasets, hub_images, load_images, shared_images
from smi_fed.data.splits import hold_out

__all__ = [
    "EMBEDDED", "SCHEMES", "SOURCES", "DataConfig", "ImageSet", "Images", "LazyImages", "digits", "folder_images",
    "from_datasets", "hold_out", "hub_images", "load_images", "owned_images", "partition", "shapes", "shared_images",
]  # fmt: skip
