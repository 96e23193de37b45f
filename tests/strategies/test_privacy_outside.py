"""Differential privacy around data-free distillation is refused before a client is asked; Flower stays as it is."""

import threading
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord
from flwr.server import strategy as legacy
from flwr.server.client_manager import SimpleClientManager
from flwr.serverapp import strategy as flower

from simulations.local_grid import InProcessGrid
from smi_fed.checks import SettingError
from smi_fed.strategies import DataFreeDistillation, LegacyDataFreeDistillation
from smi_fed.strategies.legacy import initial_parameters
from smi_fed.strategies.wrapping import refuse_privacy_outside
from tests.strategies.test_every_strategy import SAMPLING, STUDENT, client, run
from tests.strategies.test_legacy import Client, inner, one_round

NAMES = [
    f"DifferentialPrivacy{side}Side{kind}Clipping" for side in ("Server", "Client") for kind in ("Fixed", "Adaptive")
]
FLOWERS = {(api, name): getattr(api, name).__init__ for api in (flower, legacy) for name in NAMES}
PLACES = {1: {"partition-id": 0}, 2: {"partition-id": 1}, 3: {"partition-id": 2}}
every_kind = pytest.mark.parametrize("name", NAMES)


def around(api, name, strategy, kind=None):
    norm = {"clipping_norm": 1.0} if "Fixed" in name else {}
    return (kind or getattr(api, name))(strategy, noise_multiplier=0.0, num_sampled_clients=3, **norm)


def start(strategy):
    """Flower's own start; the nodes that were asked."""
    asked = []

    def answer(message, context):
        asked.append(context.node_id)
        return client(message, context)

    def begin():
        weights = DataFreeDistillation(flower.FedAvg(), student=STUDENT).initial_arrays
        strategy.start(grid=InProcessGrid(answer, PLACES), initial_arrays=weights, num_rounds=1)

    return asked, begin


class Layer(flower.FedAvg):
    """Somebody's own wrapper in between."""

    def __init__(self, strategy):
        super().__init__()
        self.strategy = strategy

    def configure_train(self, server_round, arrays, config, grid):
        yield from self.strategy.configure_train(server_round, arrays, config, grid)


@every_kind
@pytest.mark.parametrize("layers", ["next", "between", "outermost", "subclass"])
def test_nobody_is_asked(name, layers):
    ours = DataFreeDistillation(flower.FedAvg(**SAMPLING), student=STUDENT)
    own = type("Own", (getattr(flower, name),), {})
    outer = {
        "next": lambda: around(flower, name, ours),
        "between": lambda: around(flower, name, Layer(ours)),
        "outermost": lambda: Layer(around(flower, name, ours)),
        "subclass": lambda: around(flower, name, ours, own),
    }[layers]()
    asked, begin = start(outer)
    shown = "Own" if layers == "subclass" else name
    reason = rf"strategy: got 'DataFreeDistillation', allowed: the other way round, DataFreeDistillation\({shown}\("
    with pytest.raises(SettingError, match=reason):
        begin()
    assert asked == []


@every_kind
def test_nobody_is_asked_in_the_older_api(name):
    ours = LegacyDataFreeDistillation(inner("FedAvg"), student=STUDENT)
    manager, parameters = SimpleClientManager(), initial_parameters(STUDENT)
    for number in range(3):
        manager.register(Client(number, [STUDENT] * 3))
    reason = rf"the other way round, LegacyDataFreeDistillation\({name}\("
    with pytest.raises(SettingError, match=reason):
        around(legacy, name, ours).configure_fit(1, parameters, manager)


def test_the_oldest_wrapper_is_refused_too():
    outer = legacy.DPFedAvgFixed(LegacyDataFreeDistillation(inner("FedAvg"), student=STUDENT), 3, 1.0)
    with pytest.raises(SettingError, match=r"LegacyDataFreeDistillation\(DPFedAvgFixed\("):
        one_round(outer, [Client(number, [STUDENT] * 3) for number in range(3)])


@every_kind
def test_inside_and_beside_it_goes_through(name):
    wrapped, _ = run(around(flower, name, flower.FedAvg(**SAMPLING)), places=PLACES, num_rounds=1,
                     projection="per_teacher")  # fmt: skip
    assert len(wrapped.rounds) == 1

    class Beside(getattr(flower, name)):
        """Privacy for one model, and another model that is distilled in its own right."""

        def configure_train(self, server_round, arrays, config, grid):
            return list(other.configure_train(server_round, arrays, config, grid))

    other = DataFreeDistillation(flower.FedAvg(**SAMPLING), student=STUDENT)
    beside = around(flower, name, flower.FedAvg(), Beside)
    grid = InProcessGrid(client, PLACES)
    assert len(beside.configure_train(1, other.initial_arrays, ConfigRecord(), grid)) == 3


def test_flowers_classes_are_left_alone():
    DataFreeDistillation(flower.FedAvg(), student=STUDENT)
    LegacyDataFreeDistillation(inner("FedAvg"), student=STUDENT)
    assert all(getattr(api, name).__init__ is init for (api, name), init in FLOWERS.items())
    assert not any(hasattr(init, "__wrapped__") for init in FLOWERS.values())


def test_what_cannot_be_seen():
    """The security notes say so: privacy that does not call us itself, or does so from another thread."""
    ours = DataFreeDistillation(flower.FedAvg(**SAMPLING), student=STUDENT)

    class Threaded(flower.DifferentialPrivacyServerSideFixedClipping):
        def configure_train(self, *arguments):
            found = []
            thread = threading.Thread(target=lambda: found.extend(self.strategy.configure_train(*arguments)))
            thread.start()
            thread.join()
            return found

    messages = Threaded(ours, 0.0, 1.0, 3).configure_train(
        1, ours.initial_arrays, ConfigRecord(), InProcessGrid(client, PLACES)
    )
    assert len(messages) == 3


def test_the_helper_looks_only_at_calls_that_configure_a_round():
    strategy = SimpleNamespace(strategy=None)

    class DifferentialPrivacyOfSomebody:
        def __init__(self):
            self.strategy = strategy

        def configure_train(self):
            configure_train()

        def another(self):
            configure_train()

    def configure_train():
        refuse_privacy_outside(strategy)

    DifferentialPrivacyOfSomebody().another()
    with pytest.raises(SettingError, match="DifferentialPrivacyOfSomebody"):
        DifferentialPrivacyOfSomebody().configure_train()
