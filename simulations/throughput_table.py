"""The throughput of an inversion as tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_tables(result: dict[str, Any], console: Console | None = None) -> None:
    """Stages, whole trajectories and the rest of what `simulations.throughput` measured."""
    console = console or Console(width=110)
    config, where = result["config"], result["environment"]
    console.print(
        f"{config['model']}, {config['batch']} images at once, {config['dtype']}"
        f"{', compiled' if config['compile'] else ''}; {where['device_name']}, {where['threads']} threads, "
        f"torch {where['versions']['torch']}; matmul "
        + ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in result["matmul_rate"].items())
    )
    console.print(_stages(result))
    console.print(_trajectories(result))
    for name, ratio in result["ratios"].items():
        console.print(f"{name}: {ratio:.2f}")
    console.print(f"FLOPs below dense: {result['flops_below_dense']:.2%}")
    console.print(f"peak memory of the last stage over dense: {result['last_stage_over_dense_memory']:.1%}")
    for row in result.get("sweep", []):
        console.print(f"batch {row['batch']}: " + ", ".join(
            f"{name} {row[name]['ms_per_image']:.2f} ms an image at {row[name]['share_of_matmul_rate']:.0%} of the "
            "matmul rate" for name in ("dense", "last stage")))  # fmt: skip
    if "run" in result:
        run = result["run"]
        console.print(f"invert for {run['iterations']} iterations ({run['schedule']}): {run['seconds']:.1f} s; the "
                      f"stages' medians foretell {run['seconds_from_medians']:.1f} s")  # fmt: skip
    same = result["agreement"]
    said = "agree" if same.get("agrees", True) else "DISAGREE"
    console.print(
        f"fast path and plain float32 {said} after {same['iterations']} iterations: mean difference "
        f"{255 * same['mean_difference']:.2f} of 255 grey levels, {same['same_patches']:.0%} of the patches the same, "
        f"confidence {same['confidence']['fast']:.3f} and {same['confidence']['plain']:.3f}"
    )
    if "federation" in result:
        _print_federation(result["federation"], console)


def _stages(result: dict[str, Any]) -> Table:
    table = Table(title="by stage, medians")
    for heading in ("iterations", "patches", "ms an iteration", "bound, ms", "share of matmul rate", "stop, ms"):
        table.add_column(heading, justify="right")
    for stage in result["stages"]:
        table.add_row(
            f"{stage['begin']} to {stage['end']}", str(stage["kept"]), f"{stage['ms']:.1f}",
            f"{stage['bound_ms']:.1f}", f"{stage['share_of_matmul_rate']:.0%}", f"{stage['stop_ms']:.1f}",
        )  # fmt: skip
    table.add_row("naive", "all", f"{result['naive_ms']:.1f}", "", "", "")
    return table


def _trajectories(result: dict[str, Any]) -> Table:
    table = Table(title=f"whole trajectory, {result['config']['iterations']} iterations, from the stages' medians")
    for heading in ("method", "images a second", "bound", "GFLOPs an image", "peak memory, MB"):
        table.add_column(heading, justify="right")
    peaks = result["peak_bytes"]
    memory = {"naive": peaks["naive"], "dense": peaks["dense"], "sparse": peaks["dense"]}
    for name, rate in result["images_per_second"].items():
        bound = result["bound_images_per_second"].get(name)
        flops = result["flops_per_image"].get(name)
        table.add_row(
            name, f"{rate:.4g}", f"{bound:.4g}" if bound else "", f"{flops / 1e9:.0f}" if flops else "",
            f"{memory[name] / 1e6:.0f}" + (f" to {peaks['last stage'] / 1e6:.0f}" if name == "sparse" else ""),
        )  # fmt: skip
    return table


def _print_federation(found: dict[str, Any], console: Console) -> None:
    seconds = ", ".join(f"{name.partition('_')[0]}_{name.split('_')[1]} {value:.1f}" for name, value in
                        zip(found["teachers"], found["inversion_seconds"], strict=True))  # fmt: skip
    agrees = found["student_agrees_with_ensemble"]
    console.print(
        f"one-device federation, {found['images']} images of 4 teachers, {found['iterations']} iterations: inversion "
        f"{seconds} s ({found['images_per_second']:.3g} images a second), {found['distillation_steps']} steps of "
        f"distillation {found['distillation_seconds']:.1f} s; student agrees with the ensemble on "
        f"{agrees['before']:.0%} of generated images before and {agrees['after']:.0%} after"
    )
