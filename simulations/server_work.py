"""The server's work on clients that are there: `python server_work.py TREE CLIENTS [OVERRIDE ...]`.

TREE is one of this project and may be of an earlier commit: what is called here has stood in every one of them since
`simulations.server_time.EARLIER`. CLIENTS has a file client-I.safetensors of each client's
weights. The last line of output is JSON.
"""

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file


def work(tree: Path, clients: Path, overrides: list[str]) -> dict[str, object]:
    """Seconds of inversion and of distillation, and the student's accuracy."""
    from clients.app import own_images, own_statistics
    from smi_fed.config import load_settings
    from smi_fed.data import load_images
    from smi_fed.models import build_model, build_seeded
    from smi_fed.pipeline import PipelineConfig, TrainedTeacher, distill_student, invert_teacher, seeded
    from smi_fed.training import accuracy

    settings = load_settings(tree / "conf", overrides)
    torch.set_num_threads(settings.server.threads or max(1, torch.get_num_threads() // 2))
    _, test = load_images(settings.data)
    paths, teachers = sorted(clients.glob("client-*.safetensors")), []
    for number, path in enumerate(paths):
        spec = settings.model.of_client(number)
        data, model = own_images(settings, number, len(paths), spec), build_model(spec)
        model.load_state_dict(load_file(path))
        counts = tuple(data.label_counts().tolist())
        teachers.append(
            TrainedTeacher(path.stem, model.eval(), len(data), counts, own_statistics(settings, model, data))
        )
    config = PipelineConfig(settings.server.images_per_teacher, settings.inversion, settings.distillation)
    started = time.perf_counter()
    found = [
        invert_teacher(teacher, number, config, seeded(settings.seed, 1, number))[0]
        for number, teacher in enumerate(teachers)
    ]
    inverted = time.perf_counter()
    student = build_seeded(settings.model.student, settings.seed)
    distill_student(student, teachers, found, settings.distillation, seeded(settings.seed, 1, len(teachers)))
    ended = time.perf_counter()
    return {
        "inversion_seconds": inverted - started,
        "distillation_seconds": ended - inverted,
        "accuracy": accuracy(student, test),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
    }


if __name__ == "__main__":
    place = Path(sys.argv[1]).absolute()
    sys.path[0] = str(place)
    print(json.dumps(work(place, Path(sys.argv[2]), sys.argv[3:])))
