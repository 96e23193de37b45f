"""Inversions of small teachers, for every executor."""

from concurrent.futures import wait

from smi_fed.distillation import DistillationConfig
from smi_fed.executors import InversionJob
from smi_fed.inversion import InversionConfig
from smi_fed.pipeline import PipelineConfig
from smi_fed.sparse_images import SparseImages, StoredImages
from smi_fed.teachers import TrainedTeacher, store
from tests.models import small_vit

ITERATIONS = 6


def job(directory, number, iterations=ITERATIONS, last=None, poisoned=False, images=4, **kwargs):
    """An inversion whose files are in `directory`; a poisoned teacher's gradients overflow."""
    model = small_vit(seed=number, **kwargs)
    if poisoned:
        for parameter in model.parameters():
            parameter.data.mul_(1e30)
    directory.mkdir(exist_ok=True)
    teacher = store(TrainedTeacher(f"client {number}", model, 10), directory / f"{number}.model.safetensors")
    inversion = InversionConfig.paper(iterations=iterations, schedule="2:0.5", jitter=2, batch_size=4)
    pipeline = PipelineConfig(images, inversion, DistillationConfig(steps=1))
    return InversionJob(
        teacher, number, pipeline, (0, 1, number), directory / f"{number}.safetensors",
        directory / f"{number}.checkpoint", last,
    )  # fmt: skip


def two_jobs(directory):
    """Of two kinds of models, the second from earlier images."""
    earlier = job(directory, 7)
    return [job(directory, 1, patch_size=8), job(directory, 2, last=StoredImages(earlier.images, 4))], earlier


def done(executor, jobs):
    """Records, images and the iterations that were shown, of jobs side by side."""
    shown = [[] for _ in jobs]
    futures = [executor.submit(each, seen.append) for each, seen in zip(jobs, shown, strict=True)]
    wait(futures, timeout=200)
    records = [future.result(timeout=0) for future in futures]
    return records, [SparseImages.load(each.images) for each in jobs], [[now.done for now in seen] for seen in shown]
