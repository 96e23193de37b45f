"""What else could one do? `python -m simulations.baselines [--seeds 0 1 2] [--methods ...] [OVERRIDE ...]`.

The core of `simulations.convergence` (four clients, digits, Dirichlet(0.3)) by known methods: each
client alone, the ensemble, FedAvg and FedProx (one architecture, five rounds), class statistics of a
frozen start, FedDF (public pictures), DENSE (a generator), FedMITR (relabelled tokens), and ours.
One file a method; every student that is distilled has the same architecture, optimiser and steps.
"""

from __future__ import annotations

import statistics
from argparse import ArgumentParser, Namespace
from typing import NamedTuple

from simulations.baselines import report
from simulations.baselines.dense import distill_by_generator
from simulations.baselines.feddf import public_pictures
from simulations.convergence import METHODS as CONVERGENCE
from simulations.convergence import SMOKE, rate_of
from simulations.local_clients import check_clients
from simulations.local_grid import local_run
from simulations.methods import clients_on, clock, invert_all
from simulations.runner import Cell, Line, Page, Study, command
from simulations.runner.ledger import digest
from smi_fed.config import Settings
from smi_fed.data import load_images
from smi_fed.files import read_json, write_json
from smi_fed.models import build_seeded
from smi_fed.pipeline import TrainedTeacher, distill_student, seeded
from smi_fed.scores import ensemble_accuracy
from smi_fed.sparse_images import SparseImages
from smi_fed.training import accuracy

CLIENTS, IMAGES, ROUNDS = 4, 400, 5
ITERATIONS = 20


def inverted(method: str) -> tuple[str, ...]:
    """Settings of a method of the study of convergence, at its best learning rate."""
    rate = rate_of("core", method)
    return (*CONVERGENCE[method], f"inversion.learning_rate={rate}", f"server.images_per_teacher={IMAGES}")


class Baseline(NamedTuple):
    """What a method changes in conf/experiment/convergence.yaml, and when it can be used at all."""

    needs: str
    overrides: tuple[str, ...] = ()


AVERAGED = (
    "model=digits_homogeneous", "strategy.distillation=false", f"strategy.rounds={ROUNDS}",
    f"client.training.steps={400 // ROUNDS}",
)  # fmt: skip
METHODS: dict[str, Baseline] = {
    "alone": Baseline("nobody"),
    "ensemble": Baseline("all models at every use"),
    "FedAvg": Baseline("one architecture, clients over rounds", AVERAGED),
    "FedProx": Baseline(
        "one architecture, clients over rounds",
        (*AVERAGED, "strategy.name=FedProx", "strategy.arguments={proximal_mu: 0.1}"),
    ),
    "class statistics": Baseline(
        "a start that all share; images at the clients", ("strategy.distillation=false", "strategy.start=statistics")
    ),
    "FedDF": Baseline("public pictures", ("distillation.ensemble=uniform",)),
    "DENSE": Baseline("models, and examples a class"),
    "FedMITR": Baseline("models, and examples a class", (*inverted("attention"), "distillation=relabelled")),
    "ours": Baseline("models, and examples a class", inverted("rebirth at random")),
}
BOTH_WAYS = ("bytes_from_client", "bytes_to_client")
IN_THE_APP = ("FedAvg", "FedProx", "class statistics")


def add_options(parser: ArgumentParser) -> None:
    """What of the study is measured."""
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--smoke", action="store_true", help="as little as shows that every cell runs")


def cells(options: Namespace) -> list[Cell]:
    """One for each method; those over rounds have as many steps in all."""
    return [
        Cell(
            {"method": method, "smoke": options.smoke},
            (*METHODS[method].overrides, *(SMOKE if options.smoke else ())),
            (f"strategy.min_nodes={CLIENTS}",),
        )
        for method in options.methods
    ]


def measure(settings: Settings, cell: Cell) -> Line:
    """One row of one seed."""
    if cell["method"] in IN_THE_APP:
        return in_the_app(settings, cell)
    teachers, client_seconds = timed_clients(settings, cell)
    _, test = load_images(settings.data)
    begin = clock(cell.device)
    if cell["method"] == "alone":
        scores = [accuracy(each.model, test) for each in teachers]
        found: Line = {"accuracy": statistics.fmean(scores), "best": max(scores), "server_seconds": 0.0}
    elif cell["method"] == "ensemble":
        found = {"accuracy": ensemble_accuracy(teachers, settings.distillation.ensemble, test), "server_seconds": 0.0}
    else:
        student = build_seeded(settings.model.student, settings.seed).to(cell.device)
        generator = seeded(settings.seed, 1, CLIENTS)
        if cell["method"] == "DENSE":
            distill_by_generator(student, teachers, settings.distillation, generator)
        else:
            distill_student(student, teachers, images_of(settings, cell, teachers), settings.distillation, generator)
        found = {"server_seconds": clock(cell.device) - begin, "accuracy": accuracy(student, test)}
    models = sum(weight.nbytes for each in teachers for weight in each.model.state_dict().values())
    return {**found, "client_seconds": client_seconds, "bytes": 0 if cell["method"] == "alone" else models}


def images_of(settings: Settings, cell: Cell, teachers: list[TrainedTeacher]) -> list[SparseImages]:
    """What the student is shown; public pictures are shared out among the clients, as many in all."""
    if cell["method"] != "FedDF":
        return invert_all(settings, teachers, ITERATIONS, 1, cell.device)[0]
    public = public_pictures(settings, IMAGES * CLIENTS, seeded(settings.seed, 2))
    return [public.select(slice(number, None, CLIENTS)) for number in range(CLIENTS)]


def timed_clients(settings: Settings, cell: Cell) -> tuple[list[TrainedTeacher], float | None]:
    """The clients, and the seconds of their training, kept beside them; None where a run was killed before that."""
    place = cell.output / "clients"
    before, begin = set(place.glob("*.safetensors")), clock(cell.device)
    teachers = clients_on(settings, cell, CLIENTS)
    took, made = clock(cell.device) - begin, set(place.glob("*.safetensors")) - before
    path = place / f"seconds-{digest([each.digest for each in teachers])}.json"
    if len(made) == CLIENTS:
        write_json(path, {"seconds": took})
    return teachers, float(read_json(path)["seconds"]) if path.exists() else None


def in_the_app(settings: Settings, cell: Cell) -> Line:
    """A run of the app, clients and server in this process over a grid without a network."""
    with local_run(settings, cell.words, CLIENTS) as (federated, grid):
        begin = clock(cell.device)
        told = federated.execute(grid)
        seconds = clock(cell.device) - begin
    model = sum(weight.nbytes for weight in federated.student.state_dict().values())
    traffic = sum(each[way] for one in told["rounds"] for each in one.get("bytes", ()) for way in BOTH_WAYS)
    return {
        "accuracy": told["student"]["test_accuracy"],
        "client_seconds": seconds,  # the server adds models up, which is in them
        "server_seconds": 0.0,
        "bytes": traffic or 2 * CLIENTS * settings.strategy.rounds * model,
    }


STUDY = Study(
    name="baselines", about=__doc__, cells=cells, measure=measure, table=report.table,
    words=("experiment=convergence",), options=add_options, check=check_clients,
    page=Page("docs/study.md", markdown=True, note=lambda _: ", CPU, one thread; client and server in one process."),
)  # fmt: skip
main = command(STUDY)
