"""Data-free distillation for `flwr.server.strategy`, the API before messages; over the same core."""

from __future__ import annotations

import zlib
from typing import Any, Unpack

import torch
from flwr.common import FitIns, FitRes, NDArrays, Parameters, Scalar, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import strategy as legacy
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy

from smi_fed.checks import require
from smi_fed.models import Classifier, ModelSpec, build_seeded
from smi_fed.strategies import records
from smi_fed.strategies.admission import claimed_arrays
from smi_fed.strategies.core import Core
from smi_fed.strategies.options import Options
from smi_fed.strategies.round_record import Answer, RoundRecord
from smi_fed.strategies.shown import failed
from smi_fed.strategies.wrapping import check_inner, layers, projected, refuse_privacy_outside

Results = list[tuple[ClientProxy, FitRes]]
Failures = list[tuple[ClientProxy, FitRes] | BaseException]


def initial_parameters(student: ModelSpec, seed: int = 0) -> Parameters:
    """The student's random weights, for strategies that ask for them when they are made."""
    return ndarrays_to_parameters([w.numpy() for w in build_seeded(student, seed).state_dict().values()])


class LegacyDataFreeDistillation(Strategy):
    """What `DataFreeDistillation` does, for strategies of `flwr.server.strategy`.

    Clients return from `fit` what `records.pack_fit` makes: the weights in the order of the
    model's state dict, and its spec among the metrics.

    Args:
        strategy: the inner strategy.
        options: see `Options`; `student` is required.

    Raises:
        SettingError: at construction, for a strategy that cannot be wrapped or settings
            that cannot be, with the reason.
    """

    def __init__(self, strategy: Strategy, **options: Unpack[Options]) -> None:
        check_inner(
            strategy, Strategy, LegacyDataFreeDistillation, options.get("projection", "ensemble"),
            options.get("refine", False), options.get("start", "own"),
        )  # fmt: skip
        directory = options.get("state_directory")
        require(directory is None, "state_directory", directory, "None, only DataFreeDistillation resumes")
        known = options.get("known_starts", ())
        require(not known, "known_starts", known, "none, only to DataFreeDistillation clients leave something out")
        self.strategy = strategy
        self.core = Core(**options, inner=strategy)  # type: ignore[misc]
        self._asked: dict[str, ClientProxy] = {}
        self._sent: NDArrays = [weight.numpy() for weight in self.core.weights.values()]

    @property
    def student(self) -> Classifier:
        """The global model as it stands."""
        return self.core.student

    @property
    def rounds(self) -> list[RoundRecord]:
        """What each round did."""
        return self.core.rounds

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """The inner strategy's, or the student's random weights."""
        own = self.strategy.initialize_parameters(client_manager)
        return own if own is not None else ndarrays_to_parameters(self._sent)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """The inner strategy's instructions; the student starts this round from `parameters`.

        Raises:
            SettingError: differential privacy stands around this strategy and not inside.
        """
        refuse_privacy_outside(self)
        self._sent = parameters_to_ndarrays(parameters)
        self.core.student.load_state_dict(self._named(self._sent))
        instructions = self.strategy.configure_fit(server_round, parameters, client_manager)
        self._asked = {client.cid: client for client, _ in instructions}
        self.core.begin(server_round)
        return instructions

    def aggregate_fit(
        self, server_round: int, results: Results, failures: Failures
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Admit, invert, distill; then the inner strategy aggregates the student's results.

        Raises:
            TooFewTeachersError: fewer than `min_teachers` were admitted.
        """
        if self.core.round != server_round:
            self.core.begin(server_round)
        self._judge_all(results, failures)
        record = self.core.distill()
        # Who does not accept failures shall see them; privacy would skip a round for a reply that is not counted.
        strict = any(not getattr(layer, "accept_failures", True) for layer in layers(self.strategy))
        parameters, metrics = self.strategy.aggregate_fit(
            server_round, self._project(record), failures if strict else []
        )
        aggregated = None if parameters is None else self._named(parameters_to_ndarrays(parameters))
        improved, changed = self.core.refine(record, aggregated, self._named(self._sent))
        if parameters is not None:
            parameters = ndarrays_to_parameters([weight.numpy() for weight in improved.values()])
            if changed:
                self._follow(parameters)
        self.core.commit(record)
        return parameters, metrics

    def _judge_all(self, results: Results, failures: Failures) -> None:
        waiting = dict(self._asked)
        for client, reply in results:
            waiting.pop(client.cid, None)
            self.core.admit(self._answer(client, reply))
        for failure in failures:
            if isinstance(failure, tuple):
                client, reply = failure
                waiting.pop(client.cid, None)
                self.core.admit(Answer(node_of(client), failure=failed(reply.status.message)))
        # An exception does not say whose it is; those who neither answered nor failed by name are told of together.
        causes = "; ".join(str(each) or type(each).__name__ for each in failures if isinstance(each, BaseException))
        missing = failed(causes) if causes else "no reply in time"
        for client in waiting.values():
            self.core.admit(Answer(node_of(client), failure=missing))

    def _answer(self, client: ClientProxy, reply: FitRes) -> Answer:
        node = node_of(client)
        try:
            spec = str(reply.metrics.get(records.SPEC_METRIC, ""))
            arrays = claimed_arrays(spec, reply.parameters.tensors, self.core.policy, self.core.expectation)
            claim = records.read_fit(reply.metrics, reply.num_examples, arrays)
        except records.BadReplyError as error:
            return Answer(node, failure=str(error))
        return Answer(node, claim, reply=(client, reply))

    def _project(self, record: RoundRecord) -> Results:
        results, known, parameters = [], None, Parameters([], "")
        for each in projected(record, self._sent, self.strategy):
            if each.arrays is not known:
                known, parameters = each.arrays, ndarrays_to_parameters(list(each.arrays.values()))
            client, reply = each.verdict.reply
            numbers: dict[str, Scalar] = {records.TRAIN_LOSS: each.verdict.train_loss, **each.metrics}
            results.append((client, FitRes(reply.status, parameters, each.num_examples, numbers)))
        return results

    def _named(self, arrays: NDArrays) -> dict[str, torch.Tensor]:
        names = self.core.student.state_dict().keys()
        return {name: torch.tensor(array) for name, array in zip(names, arrays, strict=True)}

    def _follow(self, parameters: Parameters) -> None:
        """Strategies that keep the global model themselves go on from the refined one."""
        for layer in layers(self.strategy):
            if hasattr(layer, "current_weights"):
                layer.current_weights = parameters_to_ndarrays(parameters)
            if isinstance(layer, legacy.FedAvgM):
                layer.initial_parameters = parameters

    def configure_evaluate(self, server_round: int, parameters: Parameters, client_manager: ClientManager) -> Any:
        """The inner strategy's."""
        return self.strategy.configure_evaluate(server_round, parameters, client_manager)

    def aggregate_evaluate(self, server_round: int, results: Any, failures: Any) -> Any:
        """The inner strategy's."""
        return self.strategy.aggregate_evaluate(server_round, results, failures)

    def evaluate(self, server_round: int, parameters: Parameters) -> tuple[float, dict[str, Scalar]] | None:
        """The inner strategy's."""
        return self.strategy.evaluate(server_round, parameters)


def node_of(client: ClientProxy) -> int:
    """A number for a client, its own where its id is one."""
    return int(client.cid) if client.cid.isdigit() else zlib.crc32(client.cid.encode())
