"""What the writers write, read back by the libraries that people read it with; none of them may send anything."""

import json
import struct
import sys
from importlib import import_module
from pathlib import Path

import pytest

from smi_fed.checks import SettingError
from smi_fed.config import load_settings
from smi_fed.events import Events
from smi_fed.watchers import WRITERS, writers

CONF = Path(__file__).resolve().parents[1] / "conf"
LOSS, EXAMPLES = "distillation/progress/loss", "reply/admitted/num_examples/St Mary's (node 3)"


def told(name, directory, good=True):
    """A run of two rounds, told to one writer."""
    try:
        with Events("night", writers([name], directory), {"seed": 3, "data.name": "<b>"}) as events:
            assert len(events.watchers) == 1
            for events.round in (1, 2):
                events.tell("reply", "admitted", "St Mary's (node 3)", num_examples=7 * events.round)
                for done in (5, 10):
                    events.tell("distillation", "progress", done=done, total=10, loss=done / events.round)
            assert len(events.watchers) == 1, "the writer failed"
            if not good:
                raise RuntimeError("too few")
    except RuntimeError:
        pass


@pytest.mark.slow
def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told("tensorboard", tmp_path)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(each.step, each.value) for each in found.Scalars(LOSS)] == [(5, 5.0), (10, 10.0), (15, 2.5), (20, 5.0)]
    assert [(each.step, each.value) for each in found.Scalars(EXAMPLES)] == [(1, 7.0), (2, 14.0)]
    (about,) = found.Tensors("run/text_summary")
    assert b"seed: 3" in about.tensor_proto.string_val[0]


@pytest.mark.slow
@pytest.mark.parametrize("good", [True, False])
def test_mlflow(tmp_path, monkeypatch, good):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    told("mlflow", tmp_path / "out", good)
    client = MlflowClient(f"sqlite:///{tmp_path}/out/mlflow/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("smi-fed").experiment_id])
    assert (run.info.run_name, run.info.status) == ("night", "FINISHED" if good else "FAILED")
    assert run.data.params == {"seed": "3", "data.name": "<b>"}
    losses = client.get_metric_history(run.info.run_id, LOSS)
    assert [(each.step, each.value) for each in losses] == [(5, 5.0), (10, 10.0), (15, 2.5), (20, 5.0)]
    assert run.data.metrics["reply/admitted/num_examples/St Mary_s _node 3_"] == 14.0
    assert {path.name for path in tmp_path.iterdir()} == {"out"}  # and nothing beside it


@pytest.mark.slow
def test_wandb(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    told("wandb", tmp_path)
    import_module("wandb").teardown()  # its own process writes, and ends here
    (path,) = (tmp_path / "wandb").rglob("*.wandb")
    assert "offline-run" in str(path)
    assert wandb_history(path) == [
        {EXAMPLES: 7.0, "step": 1}, {LOSS: 5.0, "step": 5}, {LOSS: 10.0, "step": 10},
        {EXAMPLES: 14.0, "step": 2}, {LOSS: 2.5, "step": 15}, {LOSS: 5.0, "step": 20},
    ]  # fmt: skip


def wandb_history(path):
    """What stands in a run's file: a head of 7 bytes, then of each record a checksum, its length and a kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, lines = path.read_bytes(), 7, []
    while place < len(data):
        _, length, _ = struct.unpack_from("<IHB", data, place)
        record = Record.FromString(data[place + 7 : place + 7 + length])
        line = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        lines += [{key: value for key, value in line.items() if not key.startswith("_")}] if line else []
        place += 7 + length
    return lines


@pytest.mark.parametrize("name", WRITERS)
def test_a_library_that_is_not_there_is_named_with_its_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), None)
    with pytest.raises(SettingError, match=rf"watch: got '{name}', allowed: .*pip install 'smi-fed\[{name}\]'"):
        writers([name], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("watch=[tensorboard,wandb,wandb]", "watch: got .*, allowed: each at most once"),
        ("watch=[tensorbord]", r"watch\.0: got 'tensorbord', allowed: mlflow | tensorboard | wandb"),
        ("show_real=true evaluation=none", "show_real: got True, allowed: false, where the server has no test split"),
        ("show_real=true data=none", "show_real: got True, allowed: false"),
    ],
)
def test_settings_that_cannot_be(override, says):
    with pytest.raises(SettingError, match=says):
        load_settings(CONF, override)
