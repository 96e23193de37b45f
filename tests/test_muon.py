import copy
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from smi_fed.muon import COEFFICIENTS, EPSILON, ITERATIONS, Muon, orthogonalise, working_dtype

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))
# torch's own computes in bfloat16, whose last bit is 2^-8, and adds up its roundings over fifteen products.
AS_NEAR_AS_BFLOAT16 = {"atol": 0.03, "rtol": 0}


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_singular_values(matrix):
    """What `orthogonalise` should give for one matrix: its polynomial acts on each singular value alone."""
    a, b, c = COEFFICIENTS
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum().sqrt().clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        values = a * values + b * values**3 + c * values**5
    return left @ values.diag() @ right


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), SHAPES, st.integers(-6, 6), st.integers(0, 99))
@example(3, (1, 1), -6, 1)  # one is smaller than EPSILON
def test_newton_and_schulz_act_on_singular_values(count, shape, power, seed):
    matrices = 10.0**power * noise(count, *shape, seed=seed, dtype=torch.float64)
    expected = torch.stack([by_singular_values(matrix) for matrix in matrices])
    torch.testing.assert_close(orthogonalise(matrices), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(orthogonalise(matrices.float()).double(), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("shape", [(24, 24), (72, 24), (24, 96)])
def test_singular_values_come_near_one(shape):
    values = torch.linalg.svdvals(orthogonalise(noise(2, *shape)))
    # A square Gaussian matrix has some that are next to nothing: those have further to go.
    assert 0.65 < float(values[:, :-2].min()) <= float(values.max()) < 1.25


def stepped(kind, start, gradients, **kwargs):
    """Weights after one step per tuple of gradients."""
    weights = [nn.Parameter(weight.clone()) for weight in start]
    optimiser = kind(weights, **kwargs)
    for row in gradients:
        for weight, gradient in zip(weights, row, strict=True):
            weight.grad = gradient.clone()
        optimiser.step()
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 64)], ids=["square", "tall", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_steps_as_torchs_muon(shape, dtype):
    start = [noise(*shape, dtype=dtype)]
    gradients = [[noise(*shape, seed=seed, dtype=dtype)] for seed in (1, 2, 3)]
    settings = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9}
    for steps in (1, 3):
        (ours,) = stepped(Muon, start, gradients[:steps], **settings)
        (theirs,) = stepped(torch.optim.Muon, start, gradients[:steps], **settings)
        moved = 0.1 * math.sqrt(max(1, shape[0] / shape[1])) * steps
        torch.testing.assert_close((ours - theirs) / moved, torch.zeros_like(ours), **AS_NEAR_AS_BFLOAT16)
        assert float((ours - start[0]).abs().max()) / moved > 10 * AS_NEAR_AS_BFLOAT16["atol"]


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.floats(0, 0.99), st.floats(0, 1), st.integers(0, 99))
def test_two_steps_by_the_formula(shape, momentum, decay, seed):
    start, first, second = (noise(*shape, seed=seed + i, dtype=torch.float64) for i in range(3))
    buffer, expected = torch.zeros_like(start), start
    for gradient in (first, second):
        buffer = momentum * buffer + (1 - momentum) * gradient
        direction = by_singular_values(momentum * buffer + (1 - momentum) * gradient)
        expected = (1 - 0.1 * decay) * expected - 0.1 * math.sqrt(max(1, shape[0] / shape[1])) * direction
    (found,) = stepped(Muon, [start], [[first], [second]], lr=0.1, momentum=momentum, weight_decay=decay)
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=0)


def test_many_matrices_step_as_one_by_one():
    shapes = [(12, 4), (4, 12), (12, 4), (6, 8), (4, 12), (12, 4)]  # as many numbers, wide and tall
    start = [noise(*shape, seed=i) for i, shape in enumerate(shapes)]
    gradients = [[noise(*shape, seed=10 * step + i) for i, shape in enumerate(shapes)] for step in (1, 2)]
    together = stepped(Muon, start, gradients)
    for place, weight in enumerate(together):
        (alone,) = stepped(Muon, start[place : place + 1], [row[place : place + 1] for row in gradients])
        torch.testing.assert_close(weight, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision(dtype):
    start, gradient = noise(8, 6, dtype=dtype), 1e-4 * noise(8, 6, seed=1, dtype=dtype)
    (found,) = stepped(Muon, [start], [[gradient]], lr=0.5)
    (expected,) = stepped(Muon, [start.float()], [[gradient.float()]], lr=0.5)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=8 * torch.finfo(dtype).eps, rtol=0)


def test_nothing_to_step():
    still, other = nn.Parameter(noise(3, 2)), nn.Parameter(noise(3, 2, seed=1))
    other.grad = torch.zeros_like(other)
    before = [still.detach().clone(), other.detach().clone()]
    optimiser = Muon([still, other], lr=0.1, weight_decay=0.5)
    optimiser.step()
    assert torch.equal(still, before[0])
    torch.testing.assert_close(other.detach(), 0.95 * before[1])
    assert set(optimiser.state) == {other}
    with pytest.raises(ValueError, match=r"Muon: got a weight of shape \(3,\), allowed: matrices"):
        Muon([nn.Parameter(torch.zeros(3))])


def losses(model, optimiser, steps):
    found = []
    for _ in range(steps):

        def closure():
            optimiser.zero_grad()
            loss = (model.weight - 1).square().mean()
            loss.backward()
            return loss

        found.append(float(optimiser.step(closure).detach()))
    return found


@pytest.mark.parametrize("kind", [Muon, torch.optim.Muon])
def test_a_saved_state_goes_on(kind):
    """Torch's own may have written it: the state is the same."""
    model = nn.Linear(6, 8)
    optimiser = kind([model.weight])
    losses(model, optimiser, 3)
    state, copied = copy.deepcopy(optimiser.state_dict()), copy.deepcopy(model)
    other = Muon([copied.weight])
    other.load_state_dict(state)
    assert torch.equal(other.state[copied.weight]["momentum_buffer"], optimiser.state[model.weight]["momentum_buffer"])
    assert losses(copied, other, 3) == pytest.approx(losses(model, optimiser, 3), abs=1e-3)
    if kind is Muon:
        assert torch.equal(copied.weight, model.weight)


def test_a_schedule_sets_its_rate():
    weight = nn.Parameter(torch.zeros(4, 4))
    optimiser = Muon([weight], lr=0.2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5**step)
    moved = []
    for _ in range(3):
        weight.grad, before = noise(4, 4), weight.detach().clone()
        optimiser.step()
        schedule.step()
        moved.append(float((weight - before).norm()))
    assert moved[1] == pytest.approx(moved[0] / 2, rel=1e-5)
    assert moved[2] == pytest.approx(moved[0] / 4, rel=1e-5)


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32])
def test_a_cpu_computes_in_float32(given):
    assert working_dtype(torch.zeros(1, dtype=given)) == torch.float32
    assert working_dtype(torch.zeros(1, dtype=torch.float64)) == torch.float64


@pytest.mark.cuda
def test_a_gpu_steps_as_a_cpu():
    start, gradients = [noise(48, 16)], [[noise(48, 16, seed=1)]]
    (here,) = stepped(Muon, start, gradients, lr=0.1)
    (there,) = stepped(Muon, [each.cuda() for each in start], [[gradients[0][0].cuda()]], lr=0.1)
    torch.testing.assert_close(10 * (there.cpu() - here), torch.zeros_like(here), atol=0.06, rtol=0)
