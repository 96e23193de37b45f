"""The student's last head, through the whole app."""

import pytest
import torch

from clients.app import app as client_app
from server.run import FederatedRun
from simulations.local_grid import InProcessGrid
from smi_fed.class_statistics import ClassStatistics, class_statistics, discriminant, put_head
from smi_fed.config import load_settings
from smi_fed.data import digits
from smi_fed.policy import AdmissionPolicy
from smi_fed.report import load_student
from smi_fed.strategies import NoStartError
from smi_fed.strategies.finishing import QUESTION, _weighed
from tests.e2e.test_app import CONF, SMOKE, nodes, run

FINISH = f"{SMOKE} data.scheme=iid client.minimum_examples=2 strategy.finish=statistics"


def failing(kind, node):
    """Clients of which one fails when it is asked so."""

    def client(message, context):
        if (message.metadata.message_type, context.node_id) == (kind, node):
            raise RuntimeError("power cut")
        return client_app(message, context)

    return client


def execute(tmp_path, overrides, client):
    federated = FederatedRun(load_settings(CONF, overrides), tmp_path / "out")
    return federated.execute(InProcessGrid(client, nodes(), {"overrides": overrides}))


@pytest.mark.parametrize("more", ["", " evaluation=both", " model=digits_homogeneous strategy.distillation=false"])
def test_the_last_head_is_that_of_all_images_in_one_place(tmp_path, more):
    report = run(tmp_path, FINISH + more)
    student = load_student(tmp_path / "out" / "student.safetensors").eval()
    found, shared = {key: value.clone() for key, value in student.state_dict().items()}, digits()[0]
    if more != " evaluation=both":  # then each client holds some of its images out
        put_head(student, discriminant(class_statistics(student, [(shared.images, shared.labels)])))
        for key, value in student.state_dict().items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)
    assert report["finish"] == {"head": "statistics", "clients": [f"client {i}" for i in range(4)], "missing": {}}
    before = report["rounds"][-1]
    assert len(report["rounds"]) == 1
    assert report["student"]["test_accuracy"] > before["student_test_accuracy"] + 0.2  # of three steps
    if report["evaluation"]:
        means = report["evaluation"]["mean"], before["evaluation"]["mean"]
        assert means[0]["student_accuracy"] > means[1]["student_accuracy"] + 0.2
        assert means[0]["own_accuracy"] == means[1]["own_accuracy"]


def test_a_node_that_fails_is_named_and_the_others_count(tmp_path):
    failed = sorted(nodes())[1]
    report = execute(tmp_path, FINISH, failing(QUESTION, failed))
    assert len(report["finish"]["clients"]) == 3
    assert report["finish"]["missing"].keys() == {f"node {failed}"}
    assert "power cut" in report["finish"]["missing"][f"node {failed}"]


def test_without_any_statistics_the_run_says_why(tmp_path):
    with pytest.raises(NoStartError, match="no class of client.minimum_examples images"):
        run(tmp_path, f"{FINISH} client.minimum_examples=10000")


def test_a_client_answers_only_where_the_settings_say_so(tmp_path):
    """A server that asks in a run of other settings gets nothing."""
    overrides = f"{FINISH} strategy.finish=own"
    federated = FederatedRun(load_settings(CONF, FINISH), tmp_path / "out")
    with pytest.raises(NoStartError, match=r"strategy.finish: got 'own', allowed: statistics"):
        federated.execute(InProcessGrid(client_app, nodes(), {"overrides": overrides}))


def test_nobody_weighs_more_than_the_ratio_to_the_median():
    def of(images):
        count = torch.tensor([images, 0.0], dtype=torch.float64)
        return ClassStatistics(count, torch.ones(2, 3).double() * images, torch.eye(3).double() * images)

    heavy = list(_weighed([of(10.0), of(20.0), of(1e6)], AdmissionPolicy(max_claim_ratio=3.0)))
    assert [float(each.counts.sum()) for each in heavy] == pytest.approx([10, 20, 60])
    torch.testing.assert_close(heavy[2].sums / 60, torch.ones(2, 3).double())
