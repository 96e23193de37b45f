"""The throughput of an inversion as tables for people."""

from __future__ import annotations

import json
from pathlib import Path

from simulations.runner import Line, Lines, Table
from simulations.runner.publication import markdown

HEADINGS = (
    "model, device", "dtype, batch", "dense / naive", "sparse / dense (bound)", "sparse / naive",
    "images a second: naive, dense, sparse", "share of matmul rate: dense, last stage", "memory, last stage / dense",
)  # fmt: skip


def published(results: Path) -> str:
    """A Markdown table of every measurement that is kept."""
    paths = sorted(results.glob("throughput-*.json"))
    return markdown(Table(rows=[HEADINGS, *(_row(json.loads(path.read_text("utf-8")), path.name) for path in paths)]))


def _row(found: Line, name: str) -> list[str]:
    config, ratios, where = found["config"], found["ratios"], found["environment"]
    shares = [stage["share_of_matmul_rate"] for stage in (found["stages"][0], found["stages"][-1])]
    return [
        f"[{config['model']}](benchmarks/results/{name}), {where['device_name']}, {where['threads']} threads",
        f"{config['dtype']}, {config['batch']}",
        f"{ratios['dense over naive']:.2f}",
        f"**{ratios['sparse over dense']:.2f}** ({ratios['sparse over dense, bound']:.2f})",
        f"{ratios['sparse over naive']:.2f}",
        ", ".join(f"{rate:.3g}" for rate in found["images_per_second"].values()),
        ", ".join(f"{share:.0%}" for share in shares),
        f"{found['last_stage_over_dense_memory']:.0%}",
    ]


def tables(lines: Lines) -> list[Table]:
    """Stages, whole trajectories and the rest of what `simulations.throughput` measured."""
    return [table for line in lines for table in (_stages(line), _trajectories(line))]


def _stages(result: Line) -> Table:
    config, where = result["config"], result["environment"]
    compiled = ", compiled" if config["compile"] else ""
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in result["matmul_rate"].items())
    title = (
        f"{config['model']}, {config['batch']} images at once, {config['dtype']}{compiled}; {where['device_name']}, "
        f"{where['threads']} threads, torch {where['versions']['torch']}; matmul {rates}; medians by stage"
    )
    rows = [["iterations", "patches", "ms an iteration", "bound, ms", "share of matmul rate", "stop, ms"]]
    rows += [
        [f"{stage['begin']} to {stage['end']}", str(stage["kept"]), f"{stage['ms']:.1f}", f"{stage['bound_ms']:.1f}",
         f"{stage['share_of_matmul_rate']:.0%}", f"{stage['stop_ms']:.1f}"] for stage in result["stages"]
    ]  # fmt: skip
    return Table(title, [*rows, ["naive", "all", f"{result['naive_ms']:.1f}"]])


def _trajectories(result: Line) -> Table:
    peaks, rows = result["peak_bytes"], [["method", "images a second", "bound", "GFLOPs an image", "peak memory, MB"]]
    for name, rate in result["images_per_second"].items():
        row = [name, f"{rate:.4g}"]
        if name in result["flops_per_image"]:
            row += [f"{result['bound_images_per_second'][name]:.4g}", f"{result['flops_per_image'][name] / 1e9:.0f}"]
        memory = f"{peaks['naive' if name == 'naive' else 'dense'] / 1e6:.0f}"
        last = f" to {peaks['last stage'] / 1e6:.0f}" if name == "sparse" else ""
        rows.append([*row, *[""] * (4 - len(row)), memory + last])
    title = f"whole trajectory, {result['config']['iterations']} iterations, from the stages' medians"
    notes = [f"{name}: {ratio:.2f}" for name, ratio in result["ratios"].items()]
    notes += [
        f"FLOPs below dense: {result['flops_below_dense']:.2%}",
        f"peak memory of the last stage over dense: {result['last_stage_over_dense_memory']:.1%}",
        *(f"batch {row['batch']}: " + ", ".join(_in_sweep(row, name) for name in ("dense", "last stage"))
          for row in result.get("sweep", [])),
        *map(_run, [result["run"]] if "run" in result else []), _agreement(result["agreement"]),
        *map(_federation, [result["federation"]] if "federation" in result else []),
    ]  # fmt: skip
    return Table(title, rows, notes)


def _in_sweep(row: Line, name: str) -> str:
    share = f"{row[name]['share_of_matmul_rate']:.0%} of the matmul rate"
    return f"{name} {row[name]['ms_per_image']:.2f} ms an image at {share}"


def _run(run: Line) -> str:
    return (
        f"invert for {run['iterations']} iterations ({run['schedule']}): {run['seconds']:.1f} s; the stages' medians "
        f"foretell {run['seconds_from_medians']:.1f} s"
    )


def _agreement(same: Line) -> str:
    said = "agree" if same.get("agrees", True) else "DISAGREE"
    return (
        f"fast path and plain float32 {said} after {same['iterations']} iterations: mean difference "
        f"{255 * same['mean_difference']:.2f} of 255 grey levels, {same['same_patches']:.0%} of the patches the same, "
        f"confidence {same['confidence']['fast']:.3f} and {same['confidence']['plain']:.3f}"
    )


def _federation(found: Line) -> str:
    names = ["_".join(name.split("_")[:2]) for name in found["teachers"]]
    seconds = ", ".join(f"{n} {value:.1f}" for n, value in zip(names, found["inversion_seconds"], strict=True))
    agrees = found["student_agrees_with_ensemble"]
    return (
        f"one-device federation, {found['images']} images of 4 teachers, {found['iterations']} iterations: inversion "
        f"{seconds} s ({found['images_per_second']:.3g} images a second), {found['distillation_steps']} steps of "
        f"distillation {found['distillation_seconds']:.1f} s; student agrees with the ensemble on "
        f"{agrees['before']:.0%} of generated images before and {agrees['after']:.0%} after"
    )
