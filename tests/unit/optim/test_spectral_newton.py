"""SpectralNewton's step against a slow twin, torch's optimizers as its special cases, and what a step may not do."""

import math

import pytest
import torch
from cases import mlp
from torch import nn

from lightning_spectral import SpectralNewton
from lightning_spectral.optim import matrix_update
from lightning_spectral.optim.matrix_update import update_scales
from lightning_spectral.optim.step import are_finite


def twin_update(m, alpha, d, rms, gain):
    """sized(U T(sigma_hat) V^T) by an SVD, with the true spectral norm."""
    matrix = m.flatten(1).double()
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    r, n = len(sigma), max(matrix.shape)
    sigma_hat = sigma * r**0.5 / sigma.norm()
    t = sigma_hat / (sigma_hat**alpha + d)
    if rms is not None:
        t = t * rms * min((r * n) ** 0.5 / t.norm(), gain * n**0.5 / t.max())
    return ((u * t) @ vh).reshape(m.shape)


class Twin:
    """The formulas of SpectralNewton's docstring, one matrix after the other, in float64."""

    def __init__(self, weights, **options):
        self.o = {"lr": 1e-3, "alpha": 2.0, "damping": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
        self.o |= {"update_rms": "adam", "max_gain": 4.0, **options}
        self.weights = [w.detach().double().clone() for w in weights]
        self.buffers = [torch.zeros_like(w) for w in self.weights]
        self.squares, self.t = [0.0] * len(self.weights), 0

    def step(self, grads):
        o, mu = self.o, self.o["momentum"]
        self.t += 1
        for i, (w, b, g) in enumerate(zip(self.weights, self.buffers, grads, strict=True)):
            g = g.double()
            b.copy_(mu * b + (1 - mu) * g)
            m = mu * b + (1 - mu) * g if o["nesterov"] else b
            self.squares[i] = 0.999 * self.squares[i] + 0.001 * float(g.square().mean())
            adam = self.adam_rms(m, self.squares[i])
            d = max(adam**2, 0.01) if o["damping"] == "noise" else o["damping"]
            update = twin_update(
                m, o["alpha"], d, adam if o["update_rms"] == "adam" else o["update_rms"], o["max_gain"]
            )
            w.copy_((1 - o["lr"] * o["weight_decay"]) * w - o["lr"] * update)

    def adam_rms(self, m, v):
        unbiased = m / (1 - self.o["momentum"] ** (self.t + self.o["nesterov"]))
        return min(1.0, float(unbiased.square().mean().sqrt()) / math.sqrt(v / (1 - 0.999**self.t)))


SHAPES = [(8, 12), (8, 12), (12, 8), (5, 3, 3, 2), (20, 20)]


def weights_of(shapes, dtype=torch.float64):
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def set_grads(weights):
    for weight in weights:
        fall = torch.logspace(0, -2, weight[0].numel()).view_as(weight[0])
        weight.grad = (torch.randn(weight.shape) * fall).to(weight.dtype)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 3.0, "damping": 0.03, "nesterov": False, "weight_decay": 0.0},
        {"update_rms": None, "momentum": 0.0},
        {"alpha": 0.0},
        {"alpha": 1.5, "damping": 1.0, "update_rms": 1.0},
        {"update_rms": 0.2},
        {"momentum": 0.95, "nesterov": False},
        {"damping": "noise"},
        {"damping": "noise", "alpha": 3.0, "update_rms": 0.2},
        {"damping": "noise", "alpha": 1.5, "update_rms": None},
        {"damping": "noise", "alpha": 0.3},
    ],
)
def test_steps_are_those_of_the_formulas(options):
    weights = weights_of(SHAPES)
    optimizer = SpectralNewton(weights, **{"lr": 0.1, "damping": 0.1, **options})
    twin = Twin(weights, **{"lr": 0.1, **options})
    for _ in range(4):
        set_grads(weights)
        optimizer.step()
        twin.step([w.grad for w in weights])
    exact = options.get("alpha") != 1.5
    for weight, expected in zip(weights, twin.weights, strict=True):
        torch.testing.assert_close(
            weight.detach(), expected, rtol=1e-6 if exact else 1e-2, atol=1e-6 if exact else 1e-2
        )


def test_update_of_low_rank_is_bounded_in_spectral_norm():
    u = torch.stack([torch.outer(torch.randn(64), torch.randn(100)), torch.randn(64, 100), torch.zeros(64, 100)])
    factor = update_scales(u, rms=0.2, max_gain=4.0)
    norms = torch.linalg.matrix_norm(u * factor[:, None, None], ord=2)
    assert float(norms[0]) == pytest.approx(4 * 0.2 * 10, rel=1e-5)
    assert float((u[1] * factor[1]).square().mean().sqrt()) == pytest.approx(0.2, rel=1e-5)
    assert factor[2] == 0


def test_size_of_a_step_is_that_of_adamw():
    weight = nn.Parameter(torch.zeros(40, 60))
    optimizer = SpectralNewton([weight], lr=0.01, weight_decay=0.0, update_rms=0.2)
    weight.grad = torch.randn(40, 60)
    optimizer.step()
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.01 * 0.2, rel=1e-4)


def sizes_of(gradient, steps, **options):
    """Root mean square of each step, in units of lr."""
    weight = nn.Parameter(torch.zeros(40, 60))
    optimizer = SpectralNewton([weight], lr=0.01, weight_decay=0.0, **options)
    sizes = []
    for _ in range(steps):
        before = weight.detach().clone()
        weight.grad = gradient()
        optimizer.step()
        sizes.append(float((weight.detach() - before).square().mean().sqrt()) / 0.01)
    return sizes


@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e15])
def test_a_constant_gradient_steps_by_lr(scale):
    gradient = scale * torch.randn(40, 60)
    assert sizes_of(lambda: gradient.clone(), 5) == pytest.approx([1.0] * 5, rel=1e-4)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, False), (0.95, True), (0.0, False)])
def test_pure_noise_steps_by_what_momentum_leaves_of_it(momentum, nesterov):
    sizes = sizes_of(lambda: torch.randn(40, 60), 300, momentum=momentum, nesterov=nesterov)
    # M = sum_i w_i G_i: of Nesterov's, the newest gradient counts once more.
    weights = [(1 - momentum) * momentum**i for i in range(300)]
    if nesterov:
        weights = [momentum * w for w in weights]
        weights[0] += 1 - momentum
    expected = math.sqrt(sum(w**2 for w in weights))
    if not nesterov:
        assert expected == pytest.approx(math.sqrt((1 - momentum) / (1 + momentum)), rel=1e-3)
    assert sum(sizes[100:]) / 200 == pytest.approx(expected, rel=0.03)


def test_the_state_is_the_momentum_and_a_number_per_matrix():
    conv = nn.Conv2d(4, 6, 3, groups=2)
    optimizer = SpectralNewton(SpectralNewton.groups(nn.Sequential(conv, nn.Flatten(), nn.Linear(54, 2))))
    conv(torch.randn(2, 4, 5, 5)).square().sum().backward()
    optimizer.step()
    sizes = {key: value.numel() for key, value in optimizer.state[conv.weight].items()}
    assert sizes == {"momentum_buffer": conv.weight.numel(), "mean_square": 2, "step": 1, "skipped": 1}


def test_damping_follows_the_noise_of_each_matrix_of_a_batch(monkeypatch):
    seen = []
    real = matrix_update.transfer_batch

    def transfer_batch(x_brn, **options):
        seen.append(options["damping"].clone())
        return real(x_brn, **options)

    monkeypatch.setattr(matrix_update, "transfer_batch", transfer_batch)
    weights = [nn.Parameter(torch.zeros(40, 60)) for _ in range(4)]
    optimizer = SpectralNewton(weights, damping="noise", momentum=0.9)
    constant = torch.randn(40, 60)
    for step in range(60):
        noise, turning = torch.randn(2, 40, 60), constant * (-1) ** step
        for weight, gradient in zip(weights, (constant, *noise, turning), strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    assert len(seen) == 60
    agree, one, other, against = seen[-1].tolist()
    # Nesterov's momentum leaves 0.071 of the noise's variance, of which 60 steps have 2,400 draws each.
    assert agree == pytest.approx(1.0, rel=1e-4)
    assert [one, other] == pytest.approx([0.071, 0.071], rel=0.1)
    assert against == pytest.approx((0.9 * 0.1 / 1.9 + 0.1) ** 2, rel=0.01)


def reads_of_a_step(monkeypatch, **options):
    """How many times a step reads a number from the device, of three batches of matrices."""
    weights = [nn.Parameter(torch.zeros(shape)) for shape in ((8, 12), (8, 12), (12, 20), (5, 3, 3, 2))]
    optimizer = SpectralNewton(weights, **options)
    set_grads(weights)
    optimizer.step()
    reads = 0

    def counting(real):
        def read(tensor):
            nonlocal reads
            # Steps are counted on the CPU, as AdamW's are.
            reads += all(tensor is not state["step"] for state in optimizer.state.values() if "step" in state)
            return real(tensor)

        return read

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))
        optimizer.step()
    return reads


@pytest.mark.parametrize("alpha", [1.5, 2.0, 2.5])
def test_size_and_damping_by_the_noise_read_nothing_from_the_device(monkeypatch, alpha):
    reads = reads_of_a_step(monkeypatch, alpha=alpha, update_rms=0.2, damping=0.1)
    assert reads > 0
    assert reads_of_a_step(monkeypatch, alpha=alpha, update_rms="adam", damping="noise") == reads


def test_the_identity_of_adamws_size_is_normalised_momentum():
    """alpha = 0 has T = s / (1 + d), a multiple of M itself."""
    weight, steps = nn.Parameter(torch.zeros(9, 14)), []
    optimizer = SpectralNewton([weight], lr=1.0, alpha=0.0, momentum=0.9, nesterov=False, weight_decay=0.0)
    m, v = torch.zeros(9, 14), 0.0
    for t in range(1, 30):
        before = weight.detach().clone()
        weight.grad = torch.randn(9, 14) + 0.5
        m, v = 0.9 * m + 0.1 * weight.grad, 0.999 * v + 0.001 * float(weight.grad.square().mean())
        optimizer.step()
        steps.append(before - weight.detach())
        expected = m / (1 - 0.9**t) / math.sqrt(v / (1 - 0.999**t))
        torch.testing.assert_close(steps[-1], expected, rtol=1e-4, atol=1e-5)


def test_parts_of_a_projection_and_groups_have_a_size_each():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.conv = nn.Linear(8, 24, bias=False), nn.Conv2d(4, 6, 3, groups=2, bias=False)

    model = Fused()
    optimizer = SpectralNewton(SpectralNewton.groups(model, fused_qkv=["qkv"]), lr=1.0, weight_decay=0.0)
    for weight, parts in ((model.qkv.weight, 3), (model.conv.weight, 2)):
        scales = torch.logspace(0, 3, parts).repeat_interleave(len(weight) // parts)
        weight.grad = torch.randn_like(weight) * scales.view(-1, *[1] * (weight.ndim - 1))
    optimizer.step()
    for weight, parts in ((model.qkv.weight, 3), (model.conv.weight, 2)):
        expected = [part.square().mean() for part in weight.grad.chunk(parts)]
        torch.testing.assert_close(optimizer.state[weight]["mean_square"], 0.001 * torch.stack(expected))


def test_alpha_zero_is_normalised_sgd_with_nesterov_momentum():
    weight, other = nn.Parameter(torch.randn(9, 14)), None
    other = nn.Parameter(weight.detach().clone())
    optimizer = SpectralNewton([weight], lr=0.02, alpha=0.0, momentum=0.9, weight_decay=0.0, update_rms=0.2)
    sgd = torch.optim.SGD([other], lr=1.0, momentum=0.9, nesterov=True)
    for _ in range(5):
        weight.grad = torch.randn_like(weight)
        other.grad, before = weight.grad.clone(), other.detach().clone()
        optimizer.step()
        sgd.step()
        step = other.detach() - before
        with torch.no_grad():
            other.copy_(before + 0.02 * 0.2 * (9 * 14) ** 0.5 * step / step.norm())
        torch.testing.assert_close(weight, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("how", ["vectors", "group", "names"])
def test_the_rest_is_torch_adamw_bit_for_bit(how, dtype):
    shape = (7,) if how == "vectors" else (7, 5)
    ours = [nn.Parameter(torch.randn(shape).to(dtype)) for _ in range(3)]
    theirs = [nn.Parameter(w.detach().clone()) for w in ours]
    options = {"adamw_lr": 3e-3, "adamw_betas": (0.8, 0.95), "adamw_eps": 1e-6, "adamw_weight_decay": 0.1}
    if how == "names":
        optimizer = SpectralNewton([(f"{i}.head.weight", w) for i, w in enumerate(ours)], **options)
    else:
        optimizer = SpectralNewton(ours if how == "vectors" else [{"params": ours, "update": "adamw"}], **options)
    adamw = torch.optim.AdamW(theirs, lr=3e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    assert [group["update"] for group in optimizer.param_groups] == ["adamw"]
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        adamw.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[a][key], adamw.state[b][key])


def test_bfloat16_parameters():
    weights = weights_of(SHAPES, torch.bfloat16)
    before = [w.detach().double().clone() for w in weights]
    optimizer, twin = SpectralNewton(weights, lr=0.1, damping=0.1), Twin(weights, lr=0.1)
    set_grads(weights)
    optimizer.step()
    twin.step([w.grad for w in weights])
    for weight, start, expected in zip(weights, before, twin.weights, strict=True):
        assert weight.dtype is optimizer.state[weight]["momentum_buffer"].dtype is torch.bfloat16
        difference = (weight.double() - expected).norm() / (expected - start).norm()
        assert difference < 0.2  # the rounding of the weights themselves


def test_gradients_are_not_written_and_the_closure_comes_first():
    weights = weights_of([(6, 4), (3,)])
    optimizer = SpectralNewton(weights, lr=0.1)
    grads = [torch.randn_like(w) for w in weights]

    def closure():
        assert torch.is_grad_enabled()
        assert not optimizer.state
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad.clone()
        return 7.5

    assert optimizer.step(closure) == 7.5
    assert len(optimizer.state) == 2
    for weight, grad in zip(weights, grads, strict=True):
        assert torch.equal(weight.grad, grad)
    assert optimizer.step() is None


def test_parameters_without_gradients_are_left_alone():
    weights = weights_of([(6, 4), (6, 4), (3,), (3,)])
    before = [w.detach().clone() for w in weights]
    optimizer = SpectralNewton(weights)
    optimizer.step()
    for i in (0, 2):
        weights[i].grad = torch.randn_like(weights[i])
    optimizer.step()
    assert [torch.equal(w, b) for w, b in zip(weights, before, strict=True)] == [False, True, False, True]
    assert set(optimizer.state) == {weights[0], weights[2]}
    optimizer.zero_grad(set_to_none=True)
    assert all(w.grad is None for w in weights)
    optimizer.step()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_that_are_not_finite_are_skipped_and_counted(value):
    weights = weights_of([(6, 4), (6, 4), (3,), (3,)], torch.float32)
    optimizer = SpectralNewton(weights, lr=0.1)
    set_grads(weights[:2])
    weights[2].grad, weights[3].grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    before = [w.detach().clone() for w in weights]
    states = [{key: value.clone() for key, value in optimizer.state[w].items()} for w in weights]
    weights[0].grad[1, 2] = value
    weights[2].grad[0] = value
    for _ in range(2):
        optimizer.step()
    moved = [not torch.equal(w, b) for w, b in zip(weights, before, strict=True)]
    assert moved == [False, True, False, True]
    for i in (0, 2):
        for key, kept in states[i].items():
            assert key == "skipped" or torch.equal(optimizer.state[weights[i]][key], kept)
    assert [int(optimizer.state[w]["skipped"]) for w in weights] == [2, 0, 2, 0]
    assert optimizer.skipped_updates == 4
    assert all(w.isfinite().all() for w in weights)


def test_a_norm_that_overflows_is_finite():
    finite = [torch.full((4, 4), 1e30), torch.tensor([math.nan]), torch.ones(4), torch.tensor([1.0, math.inf])]
    assert are_finite(finite) == [True, False, True, False]
    assert are_finite([]) == []


def test_large_batches_are_done_in_parts(monkeypatch):
    results = []
    for limit in (2**20, 100):
        monkeypatch.setattr("lightning_spectral.optim.matrix_update.CACHED_NUMEL", limit)
        torch.manual_seed(1)
        weights = weights_of([(8, 12)] * 5)
        optimizer = SpectralNewton(weights)
        set_grads(weights)
        optimizer.step()
        results.append(torch.stack([w.detach() for w in weights]))
    torch.testing.assert_close(*results)


def test_autocast_around_a_step_does_not_reach_it():
    results = []
    for enabled in (False, True):
        torch.manual_seed(1)
        weights = weights_of([(32, 48)], torch.float32)
        optimizer = SpectralNewton(weights, alpha=1.0, damping=0.03)
        set_grads(weights)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            optimizer.step()
        results.append(weights[0])
    assert torch.equal(*results)


def test_grad_scaler_without_closure():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    optimizer = SpectralNewton(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    twin = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    twin.load_state_dict(model.state_dict())
    plain = SpectralNewton(twin.parameters(), lr=0.1)
    x = torch.randn(8, 4)
    scaler.scale(model(x).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    twin(x).square().mean().backward()
    plain.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    before = model[0].weight.detach().clone()
    model[0].weight.grad.fill_(math.inf)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model[0].weight, before)
    assert scaler.get_scale() == 512.0


def test_compiled_step():
    results = []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = mlp()
        optimizer = SpectralNewton(model.parameters(), lr=0.1, alpha=1.0)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(16, 6)).square().mean().backward()
            step()
        results.append(list(model.parameters()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_tensor_learning_rate():
    results = []
    for lr in (0.1, torch.tensor(0.1), torch.tensor([0.1])):
        torch.manual_seed(1)
        weights = weights_of(SHAPES, torch.float32)
        optimizer = SpectralNewton([{"params": weights, "lr": lr}])
        set_grads(weights)
        optimizer.step()
        results.append(weights)
    for a, b, c in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


def test_sparse_gradients_are_refused():
    for named in (False, True):
        table = nn.Embedding(5, 3, sparse=True)
        optimizer = SpectralNewton(table.named_parameters() if named else table.parameters())
        table(torch.tensor([1])).sum().backward()
        name = "weight" if named else "0 of group 'spectral'"
        with pytest.raises(RuntimeError, match=f"the gradient of parameter {name} is sparse.*torch.optim.SparseAdam"):
            optimizer.step()
