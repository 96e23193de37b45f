"""The ServerApp: FedAvg, and a test of every round's global model."""

import json
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from pictures_app.task import load_folder, make_model, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds and write down what each round's global model can do."""
    torch.manual_seed(0)
    config = context.run_config
    images = load_folder(Path(config["data"], "test"), config["image-size"])
    model = make_model(config["model"], config, images.classes)

    def evaluate(_: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        loss, accuracy = test(model, images)
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    strategy = FedAvg()
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=config["rounds"],
        evaluate_fn=evaluate,
    )
    history = {number: dict(metrics) for number, metrics in result.evaluate_metrics_serverapp.items()}
    print("test set, by round:", json.dumps(history))
    if config["output"]:
        Path(config["output"]).write_text(json.dumps(history), encoding="utf-8")
