"""`smi-fed audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smi_fed.audit import AuditConfig, LocalPrivacy, Recipe, audited
from smi_fed.checks import require
from smi_fed.cli.inverting import AsJson, Changes
from smi_fed.cli.output import tell
from smi_fed.config import CONF, load_settings
from smi_fed.data import load_images
from smi_fed.devices import choose_device
from smi_fed.files import write_json
from smi_fed.pipeline import PipelineConfig


def audit(
    changes: Changes = None,
    worlds: Annotated[int, typer.Option(min=4, help="models that are trained, each on half of the examples")] = 16,
    canaries: Annotated[int, typer.Option(min=0, help="examples with a wrong label, whom memory alone can know")] = 50,
    arch: Annotated[str, typer.Option(help="a name under model.clients; the first one by default")] = "",
    statistics: Annotated[bool, typer.Option(help="clients send feature statistics")] = True,
    counts: Annotated[bool, typer.Option(help="clients send label counts")] = True,
    clip: Annotated[float, typer.Option(min=0, help="largest norm of an update; 0 does not clip")] = 0.0,
    epsilon: Annotated[float, typer.Option(min=0, help="with --clip: noise as Flower's LocalDpMod; 0: none")] = 0.0,
    output: Annotated[Path | None, typer.Option(help="a JSON file for what was found")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what models, their synthetic images and their students tell of single training examples.

    Many models are trained with one's own settings, each on half of the data; each is inverted and distilled, and
    attacked by what is known of the others (LiRA). Tells whether members can be told from others, and whether
    synthetic images lie nearer to training images than to others. KEY=VALUE changes a setting of conf/config.yaml.

    Example: smi-fed audit --worlds 16 client.training.steps=400 --json
    """
    settings = load_settings(CONF, changes or [])
    device, _ = choose_device(settings.server.device, "server.device")
    data, test = load_images(settings.data)
    require(canaries <= len(data) // 2, "--canaries", canaries, f"at most half of the {len(data)} examples")
    model = settings.model.of_client(0, arch or None)
    known = statistics and settings.inversion.statistics > 0
    pipeline = PipelineConfig(settings.server.images_per_teacher, settings.inversion, settings.distillation)
    require(clip > 0 or not epsilon, "--epsilon", epsilon, "0 without --clip")
    private = LocalPrivacy(clip, 2 * clip if epsilon else 0.0, epsilon or 1.0) if clip else None
    recipe = Recipe(model, settings.model.student, settings.client.training, pipeline, known, counts, private)
    found = audited(recipe, data, test, AuditConfig(worlds, canaries), settings.seed, device).plain()
    if output is not None:
        write_json(output, found)
    tell(found, as_json)
