"""How clients share one set of images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from smi_fed.checks import SettingError, is_integer, require
from smi_fed.data.config import DataConfig


def partition(labels: Tensor, config: DataConfig, partitions: int, seed: int) -> list[NDArray[np.int64]]:
    """Indices of each partition, by flwr-datasets' partitioners; some may be empty.

    Raises:
        SettingError: fewer than one partition, more than there are images, or more classes per
            partition than there are or than there are images for.
    """
    key, images = "num-partitions", len(labels)
    require(is_integer(partitions) and partitions > 0, key, partitions, "an int >= 1")
    require(partitions <= images, key, partitions, f"at most {images}, a training image for each client")
    order = np.random.default_rng(seed).permutation(len(labels))
    if partitions == 1 and config.scheme == "iid":  # as the partitioner has it, without seconds of imports
        return [order]
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, PathologicalPartitioner

    if config.scheme == "iid":
        partitioner: Any = IidPartitioner(partitions)
    elif config.scheme == "dirichlet":
        partitioner = DirichletPartitioner(
            partitions, "label", config.alpha, min_partition_size=0, self_balancing=True, seed=seed
        )
    else:
        classes, each = len(labels.unique()), config.classes_per_partition
        require(each <= classes, "data.classes_per_partition", each, f"at most the {classes} classes")
        partitioner = PathologicalPartitioner(
            partitions, "label", each, class_assignment_mode="deterministic", shuffle=True, seed=seed
        )
    partitioner.dataset = Dataset.from_dict({"index": order, "label": labels.numpy()[order]})
    try:
        parts = [partitioner.load_partition(i) for i in range(partitions)]
    except ValueError as error:
        if config.scheme != "pathological":
            raise
        reason = f"fewer, or fewer than {partitions} clients: some class has fewer images than clients that share it"
        raise SettingError("data.classes_per_partition", config.classes_per_partition, reason) from error
    return [np.array(part["index"], dtype=np.int64) for part in parts]
