"""Every field of every class of settings has a value that is refused; all of a class are told at once."""

from dataclasses import fields

import pytest

from simulations.throughput import ThroughputConfig
from simulations.throughput.one_device import FederationConfig
from smi_fed.checks import SettingError, read
from smi_fed.config import ClientConfig, ModelsConfig, ServerConfig, Settings, StrategyConfig
from smi_fed.data import DataConfig
from smi_fed.distillation import Agreement, DistillationConfig, Mean, Median, Trimmed
from smi_fed.inversion import (
    Adaptive,
    Converged,
    Fixed,
    InversionConfig,
    Keep,
    Last,
    PixelsConfig,
    PyramidConfig,
    Rebirth,
    StopSchedule,
)
from smi_fed.models import ModelSpec
from smi_fed.pipeline import PipelineConfig
from smi_fed.policy import AdmissionPolicy
from smi_fed.pool import PoolConfig
from smi_fed.training import TrainingConfig

COUNT, NATURAL, FLAG, TEXT, GROUP = "an int >= 1", "an int >= 0", "true | false", "a text", "a mapping"
POSITIVE, NON_NEGATIVE, SHARE = "a number > 0", "a number >= 0", "a number inside (0, 1)"
BETAS, PAIRS = "two numbers in [0, 1)", "ITERATION:RATIO pairs separated by commas, such as 50:0.3,100:0.3"
GROUPS = ("model", "data", "client", "server", "inversion", "distillation", "strategy", "admission", "pool")
CHANNELS = "finite numbers, above 0 for std, one per channel"

TRAINING = {
    "steps": (0, COUNT), "batch_size": (True, COUNT), "optimiser": ("sgd", "adamw | muon"),
    "learning_rate": ("1e-3", POSITIVE), "muon_learning_rate": (0.0, POSITIVE), "betas": ((0.9, 1.0), BETAS),
    "weight_decay": (-0.1, NON_NEGATIVE), "warmup": (1, SHARE), "clip": (float("inf"), POSITIVE),
    "jitter": (-1, NATURAL), "epochs": (0, "a number > 0 or null"),
    "trainable": ("last:0", "all | head | last:N, N layers >= 1"), "layer_decay": (1.1, "a number in (0, 1]"),
    "balanced": (None, FLAG), "augmentation": ("cutmix", "none | randaugment | standard"),
    "precision": ("float16", "bfloat16 | float32"), "validation": (1.0, "a number in [0, 1)"), "patience": (0, COUNT),
}  # fmt: skip

FAULTS = {
    StopSchedule: {"stops": (None, "a list")},
    InversionConfig: {
        "iterations": (0, COUNT), "schedule": ("50", PAIRS), "learning_rate": (0, POSITIVE),
        "learning_rate_decay": ("linear", "constant | cosine"), "betas": ([1, 0], BETAS),
        "parametrisation": ("fourier", "pixels | pyramid"), "background": ("black", "frozen | rendered"),
        "selection": (
            "all", "attention | gradient | proportional | random | stratified | tempered | unsettled",
        ),
        "stopping": (True, "keep | rebirth"), "leaving": (None, "converged | last"),
        "planning": (["fixed"], "adaptive | fixed"), "tv": (-1, NON_NEGATIVE), "statistics": ("much", NON_NEGATIVE),
        "batchnorm": (True, NON_NEGATIVE), "jitter": (-1, NATURAL), "flip": (None, FLAG),
        "batch_size": ("many", "an int >= 1 or auto"), "precision": ("float16", "bfloat16 | float32"),
        "compile": (0, FLAG), "patch_size": (0, "an int >= 1 or null"),
    },
    PixelsConfig: {"kind": ("pyramid", "pixels")},
    PyramidConfig: {
        "kind": (0, "pyramid"), "levels": ([0], "different ints >= 1"), "start_scale": (-1, NON_NEGATIVE),
    },
    Keep: {"kind": ("rebirth", "keep")},
    Rebirth: {"kind": (None, "rebirth")},
    Last: {"kind": (["last"], "last")},
    Converged: {
        "kind": ("last", "converged"), "patience": (1.5, COUNT), "tolerance": (1.0, "a number in [0, 1)"),
    },
    Fixed: {"kind": ("Fixed", "fixed")},
    Adaptive: {"kind": (True, "adaptive")},
    TrainingConfig: TRAINING,
    DistillationConfig: TRAINING | {
        "temperature": (0.0, POSITIVE), "mixup": ("1", NON_NEGATIVE), "tokens": ("some", "all | kept | mixed"),
        "ensemble": ("median", "certainty | class | class_certainty | examples | uniform"),
        "robust": ("krum", "agreement | mean | median | trimmed"),
        "others": (0, COUNT), "relabel": (-0.1, NON_NEGATIVE), "anchor": (-1, NON_NEGATIVE), "steps": (-1, NATURAL),
    },
    Mean: {"kind": ("median", "mean")},
    Median: {"kind": (None, "median"), "most": (0.0, "a number in (0, 1]")},
    Trimmed: {"kind": (1, "trimmed"), "cut": (0.5, "a number in [0, 0.5)"), "most": (1.1, "a number in (0, 1]")},
    Agreement: {
        "kind": ("mean", "agreement"), "images": (0, COUNT), "least": (1.0, SHARE),
        "trigger": (1.0, "a number inside (0, 1) or null"),
    },
    DataConfig: {
        "source": ("disk", "digits | folder | hub | manifest | none | shapes"), "name": (3, TEXT),
        "split": (1, TEXT), "nodes": ("/data", "a list"), "image_size": (7, "an int >= 8"),
        "channels": (2, "1 | 3"), "test_fraction": (1.0, "a number in [0, 1)"),
        "image_column": (None, TEXT), "label_column": (1, TEXT),
        "scheme": ("random", "dirichlet | iid | pathological"), "alpha": (0, POSITIVE),
        "classes_per_partition": (1.5, COUNT), "background": (1.1, "a number in [0, 1]"),
        "memory": (0, COUNT), "workers": (0, "an int from 1 to 256"),
    },
    PoolConfig: {"images": (-1, NATURAL), "decay": (1.1, "a number in (0, 1]"), "warm": (1, FLAG)},
    PipelineConfig: {"images_per_teacher": (0, COUNT), "inversion": (None, GROUP), "distillation": (3, GROUP)},
    ModelSpec: {
        "name": ("", "a timm model name"), "num_classes": (2.0, COUNT), "image_size": ((32, 32), "an int >= 1 or null"),
        "kwargs": ([("depth", 3)], GROUP), "mean": ((True,), CHANNELS), "std": ((0.5, 0.0), CHANNELS),
        "class_names": ("abc", "a list of names"), "start": ("", "null | pretrained | the path of a file of weights"),
    },
    AdmissionPolicy: {
        "architectures": (None, "a list"), "max_parameters": (0, COUNT), "max_examples": (1e6, COUNT),
        "max_claim_ratio": (0.5, "a number >= 1"),
    },
    ModelsConfig: {"clients": (None, GROUP), "student": ("vit", GROUP)},
    ClientConfig: {
        "training": (None, GROUP), "device": ("gpu", "auto | cpu | cuda | cuda:N"),
        "send_label_counts": (1, FLAG), "minimum_examples": (1, "an int >= 2"),
        "student_weight": (1, "a number in [0, 1)"), "student_temperature": (0, POSITIVE),
    },
    ServerConfig: {
        "device": ("tpu", "auto | cpu | cuda | cuda:N"), "images_per_teacher": (0, COUNT), "min_teachers": (0, COUNT),
        "threads": (-1, "an int from 0 to 1024"), "executor": ("there", "here | pool | ray"),
        "workers": (-1, "an int from 0 to 1024"), "ray_address": ("host", "empty | host:port | ray://host:port"),
    },
    StrategyConfig: {
        "name": (
            "FedBest", "Bulyan | FedAdagrad | FedAdam | FedAvg | FedAvgM | FedMedian | FedProx | FedTrimmedAvg"
            " | FedYogi | Krum | MultiKrum | QFedAvg",
        ),
        "arguments": (3, GROUP), "distillation": ("no", FLAG), "projection": ("all", "ensemble | per_teacher"),
        "refine": (None, FLAG), "start": ("zero", "average | own | pretrained | random | statistics"),
        "finish": ("average", "own | statistics"), "rounds": (0, COUNT), "timeout": (0, POSITIVE),
        "min_nodes": (-1, COUNT), "quorum": (0, COUNT), "grace_seconds": (-1, "a number >= 0"),
        "asynchronous": (None, FLAG), "staleness": ("much", "a number >= 0"),
    },
    Settings: {
        "seed": (-1, NATURAL), "evaluation": ("client", "both | clients | none | server"),
        "watch": ("wandb", "a list"), "show_real": (1, FLAG),
        **dict.fromkeys(GROUPS, (None, GROUP)),
    },
    FederationConfig: {"images": (-1, NATURAL), "iterations": (7, "an int >= 8"), "steps": (0, COUNT)},
    ThroughputConfig: {
        "device": (0, "auto | cpu | cuda | cuda:N"), "model": (None, TEXT), "batch": (0, COUNT),
        "dtype": ("float16", "bfloat16 | float32"), "compile": (1, FLAG), "iterations": (0, COUNT),
        "schedule": (5, TEXT), "threads": (-1, NATURAL), "warmup": (-1, NATURAL), "repeats": (0, COUNT),
        "inner": (0, COUNT), "run": (-1, NATURAL), "sweep": (3, "a list"), "seed": (-1, NATURAL),
        "federation": (None, GROUP), "out": (None, TEXT),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_every_field_is_checked_and_all_faults_are_told_at_once(kind):
    assert FAULTS[kind].keys() == {each.name for each in fields(kind)}
    values = {key: value for key, (value, _) in FAULTS[kind].items()}
    for make in (lambda: kind(**values), lambda: read(kind, values)):
        with pytest.raises(SettingError) as error:
            make()
        found = {each.key: (each.got, each.allowed) for each in (error.value, *error.value.more)}
        assert found == FAULTS[kind]


SPEC = ModelSpec("resnet10t", 3)
TOGETHER = [
    (StopSchedule, {"stops": ((5, 0.3), (5, 0.3))}, "stops", "strictly increasing iterations"),
    (StopSchedule, {"stops": ((5, 1.0),)}, "stops.0.1", SHARE),
    (InversionConfig, {"schedule": "9:0.5", "iterations": 9}, "schedule", "stops before the last iteration, 9"),
    (PyramidConfig, {"levels": ()}, "levels", "different ints >= 1"),
    (PyramidConfig, {"levels": (4, 4)}, "levels", "different ints >= 1"),
    (InversionConfig, {"parametrisation": {"kind": "pyramid", "levels": []}}, "parametrisation.levels", "different"),
    (InversionConfig, {"background": "rendered"}, "background", "frozen, where parametrisation is pixels"),
    (InversionConfig, {"stopping": "rebirth", "planning": "adaptive"}, "planning", "fixed, where stopping is rebirth"),
    (InversionConfig, {"statistics": 1}, "flip", "false, where statistics > 0"),
    (InversionConfig, {"statistics": 1, "batch_size": "auto", "flip": False}, "batch_size", "an int, where statistics"),
    (InversionConfig, {"batchnorm": 1, "batch_size": "auto"}, "batch_size", "an int, where batchnorm > 0"),
    (DistillationConfig, {"relabel": 0.5, "tokens": "kept"}, "relabel", "0 unless tokens is all"),
    (DistillationConfig, {"relabel": 0.5, "tokens": "mixed"}, "relabel", "0 unless tokens is all"),
    (TrainingConfig, {"layer_decay": 0.5}, "layer_decay", "1, unless optimiser is adamw"),
    (DistillationConfig, {"layer_decay": 0.5}, "layer_decay", "1, unless optimiser is adamw"),
    (DistillationConfig, {"augmentation": "standard", "tokens": "mixed"}, "augmentation", "none, where tokens"),
    (DistillationConfig, {"augmentation": "standard", "relabel": 0.1}, "augmentation", "none, where tokens"),
    (ModelSpec, {"name": "a", "num_classes": 3, "start": "a.pth", "kwargs": {"pretrained": True}}, "start", "null"),
    (DataConfig, {"source": "hub"}, "name", "a name for source hub"),
    (DataConfig, {"source": "folder"}, "name", "a name for source folder"),
    (DataConfig, {"source": "manifest"}, "name", "a name for source manifest"),
    (DataConfig, {"split": "north"}, "split", "none, but for source hub"),
    (DataConfig, {"source": "shapes"}, "channels", "3, for source shapes"),
    (ModelSpec, {"name": "a", "num_classes": 3, "class_names": ("a", "b")}, "class_names", "3 names"),
    (ModelSpec, {"name": "a", "num_classes": 3, "mean": ()}, "mean", CHANNELS),
    (ServerConfig, {"workers": 2}, "workers", "0, where executor is here"),
    (ServerConfig, {"executor": "ray", "device": "cuda:1"}, "device", "auto | cpu | cuda, where executor is ray"),
    (ServerConfig, {"executor": "pool", "ray_address": "a:1"}, "ray_address", "empty, where executor is not ray"),
    (ModelsConfig, {"clients": {}, "student": SPEC}, "clients", "at least one architecture"),
    (ThroughputConfig, {"schedule": ""}, "schedule", "at least one stop"),
    (ThroughputConfig, {"schedule": "9:0.5", "iterations": 9}, "schedule", "stops before the last iteration"),
]


@pytest.mark.parametrize(("kind", "values", "key", "allowed"), TOGETHER)
def test_values_that_do_not_go_together_are_refused(kind, values, key, allowed):
    with pytest.raises(SettingError) as error:
        kind(**values)
    assert error.value.key == key
    assert error.value.allowed.startswith(allowed)
