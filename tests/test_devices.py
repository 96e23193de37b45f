import pytest
import torch

from smi_fed.checks import SettingError
from smi_fed.devices import choose_device, own_threads, usable_cores


@pytest.fixture
def machine(monkeypatch):
    def has(gpus, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU of 1999")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return has


@pytest.mark.parametrize(
    ("gpus", "mps", "device", "reason"),
    [(1, False, "cuda", "a GPU of 1999"), (2, True, "cuda", "CUDA is available"),
     (0, False, "cpu", "no CUDA device"), (0, True, "cpu", "MPS lacks float64")],
)  # fmt: skip
def test_auto_takes_what_there_is_and_says_why(machine, gpus, mps, device, reason):
    machine(gpus, mps)
    for chosen, why in (choose_device(), choose_device("auto")):
        assert chosen == torch.device(device)
        assert reason in why


@pytest.mark.parametrize(("gpus", "name"), [(0, "cpu"), (1, "cpu"), (1, "cuda"), (1, "cuda:0"), (2, "cuda:1")])
def test_a_device_that_was_asked_for(machine, gpus, name):
    machine(gpus)
    assert choose_device(name) == (torch.device(name), "asked for by the configuration")


@pytest.mark.parametrize(("gpus", "name"), [(0, "cuda"), (0, "cuda:0"), (1, "cuda:1"), (2, "cuda:2")])
def test_a_device_that_is_not_there(machine, gpus, name):
    machine(gpus)
    with pytest.raises(SettingError, match=f"device: got '{name}', allowed: a device that this machine has"):
        choose_device(name)


@pytest.mark.parametrize("name", ["gpu", "", "mps", "meta", "cuda:x", "cuda:-1", "CPU "])
def test_a_device_that_is_unknown(machine, name):
    machine(1)
    with pytest.raises(SettingError, match=r"allowed: auto \| cpu \| cuda \| cuda:N") as error:
        choose_device(name)
    assert (error.value.key, error.value.got) == ("device", name)


@pytest.mark.cuda
def test_auto_takes_the_gpu_of_this_machine():
    device, reason = choose_device()
    assert torch.ones(2, device=device).is_cuda
    assert torch.cuda.get_device_name() in reason


@pytest.mark.parametrize(
    ("said", "cores", "threads"), [(None, 1, 1), (None, 2, 1), (None, 17, 8), ("3", 2, 3), ("0", 8, 1), ("4,2", 8, 4)]
)
def test_threads_of_a_process_that_was_told_no_number(monkeypatch, said, cores, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert usable_cores() == cores
    assert own_threads() == threads
