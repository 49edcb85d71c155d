"""Private names of torch stand in one module, and do what it says of them: seen on torch 2.13.0."""

import copy
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.join import Joinable
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import lightning_spectral
from lightning_spectral import _torch_private as private

ROOT = Path(lightning_spectral.__file__).parent
NAMES = re.compile(
    r"torch\._(?!foreach_)\w+|torch\.utils\._\w+|\b_is_view\b|_unsafe_view|_saved_training|_cdata\b|_last_lr"
    r"|\._schedulers|_torchdynamo|__composable|_join_config|\._iterator\b|autocast\.__enter__|hooks\.__enter__"
    r"|F\.linear = |\._buffers\b|_local_scalar_dense|_function_mode_stack"
)
ALLOWED = {
    # Whether anything was compiled, and where classes of torch.distributed live: looked at, not touched.
    "isolation/sandbox.py": {"torch._dynamo"},
    "distributed/dtensor.py": {"torch._C"},
}


def test_private_names_stand_in_one_module():
    for path in sorted(ROOT.rglob("*.py")):
        where = str(path.relative_to(ROOT))
        if where != "_torch_private.py":
            assert set(NAMES.findall(path.read_text())) <= ALLOWED.get(where, set()), where


def test_a_missing_name_is_named():
    with pytest.raises(ImportError, match=rf"torch {re.escape(torch.__version__)} has no torch\._C\.Nothing"):
        private.private("torch._C", "Nothing")
    with pytest.raises(ImportError, match=r"has no torch\._nothing\.name"):
        private.private("torch._nothing", "name")


def test_views_share_a_key():
    x, y = torch.ones(4), torch.ones(4)
    assert private.storage_key(x) == private.storage_key(x[1:]) != private.storage_key(y)
    x.untyped_storage().resize_(0)
    y.untyped_storage().resize_(0)
    assert private.storage_key(x) != private.storage_key(y)
    assert private.storage_key(torch.sparse_coo_tensor(size=(2, 2))) is None


def test_a_non_view_keeps_its_edge_through_an_operation_in_place():
    x = torch.ones(2, 3, 4, requires_grad=True)
    view = (x * 1)[:]
    node = view.grad_fn
    assert private.as_non_view(view).grad_fn is not node
    plain = private.as_non_view((x * 1)[:])
    edge = plain.grad_fn
    plain.relu_()
    assert plain.grad_fn.next_functions[0][0] is edge
    constant = torch.ones(2)[:]
    assert private.as_non_view(constant) is constant


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_tells_its_statistics(training):
    x = torch.randn(4, 3, requires_grad=True)
    y = F.batch_norm(x, torch.zeros(3), torch.ones(3), training=training)
    assert private.trained_on_batch_statistics(y.grad_fn) is training
    assert private.trained_on_batch_statistics(object())


def test_what_was_compiled_is_found():
    def function(x):
        return x + 1

    assert private.uncompiled(torch.compile(function)) is function
    assert private.uncompiled(function) is None


def test_what_is_not_compiled_runs_as_it_is():
    compiling = []

    @private.not_compiled
    def plain(x):
        compiling.append(torch.compiler.is_compiling())
        return x + 1

    compiled = torch.compile(lambda x: plain(2 * x) * 3, backend="eager")
    assert [compiled(torch.tensor(float(i))).item() for i in range(2)] == [3.0, 9.0]
    assert compiling == [False, False]


def test_composable_state_is_recognised():
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("FSDP2 is of torch 2.6 and later")
    assert private.is_composable_state("__composable_api_state_key")
    assert not private.is_composable_state("_parameters")


class Joined(Joinable):
    join_hook = join_device = join_process_group = None

    def __init__(self):
        super().__init__()


def test_only_a_joined_ddp_may_step_alone():
    assert not private.may_step_alone(None)
    joined = Joined()
    assert not private.may_step_alone(joined)
    joined._join_config = joined._join_config._replace(enable=True)
    assert private.may_step_alone(joined)


def test_schedulers_tell_their_parts_and_rates():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5)
    one = torch.optim.lr_scheduler.ConstantLR(optimizer)
    chain = torch.optim.lr_scheduler.ChainedScheduler([one])
    assert list(private.schedulers_in(chain)) == [one]
    assert private.schedulers_in(one) == ()
    assert getattr(one, private.LAST_RATES) == one.get_last_lr()


def test_a_copied_loader_has_an_iterator_of_its_own():
    loader = DataLoader(torch.arange(6), 2, num_workers=1, persistent_workers=True)
    running = iter(loader)
    next(running)
    other = private.without_worker_iterator(copy.copy(loader))
    assert [batch.tolist() for batch in other] == [[0, 1], [2, 3], [4, 5]]
    assert [batch.tolist() for batch in running] == [[2, 3], [4, 5]]


def test_no_autocast_inside():
    x = torch.ones(2, 2)
    reused = torch.autocast("cpu", dtype=torch.bfloat16)
    with private.no_autocast_inside(), reused:
        assert (x @ x).dtype is torch.float32
    with reused:
        assert (x @ x).dtype is torch.bfloat16


def test_the_older_switch_of_cudnn_is_inert_and_as_it_was_after(monkeypatch):
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    with private.inert_cudnn_tf32():
        cudnn.allow_tf32 = True
        assert cudnn.allow_tf32 is False
        with cudnn.flags(enabled=False, allow_tf32=True):
            assert cudnn.allow_tf32 is False
    assert cudnn.allow_tf32 is before
    # A torch without the private names is left alone.
    monkeypatch.delattr(torch._C, "_get_cudnn_allow_tf32")
    with private.inert_cudnn_tf32():
        assert not hasattr(torch._C, "_get_cudnn_allow_tf32")


def test_hooks_on_saved_tensors_are_noticed():
    entered = []
    hooks = torch.autograd.graph.saved_tensors_hooks
    with private.on_saved_tensors_hooks(lambda: entered.append(1)), hooks(lambda x: x, lambda x: x):
        pass
    with hooks(lambda x: x, lambda x: x):
        pass
    assert entered == [1]


def test_linear_is_replaced_and_put_back():
    linear, seen = F.linear, []

    def noted(original):
        return lambda *args: seen.append(1) or original(*args)

    attention = nn.MultiheadAttention(4, 1).train()
    x = torch.ones(3, 2, 4)
    with private.patched_linear(noted):
        attention(x, x, x)
    assert seen
    assert F.linear is linear


class Mode(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_the_stack_of_modes_is_as_it_was(monkeypatch):
    outer, inner = Mode(), Mode()
    with outer:
        with private.restored_function_modes(inner, lambda error: None):
            torch.ones(1) + 1
        torch.ones(1) + 1
    assert inner.calls >= 1
    assert outer.calls > inner.calls
    calls = outer.calls
    torch.ones(1) + 1
    assert outer.calls == calls
    released = []
    with pytest.raises(ValueError, match="lost"), private.restored_function_modes(inner, released.append):
        raise ValueError("lost")
    assert len(released) == 1
    # Without the private stack it is an ordinary mode.
    monkeypatch.delattr(torch.overrides, "_get_current_function_mode_stack")
    calls = inner.calls
    with private.restored_function_modes(inner, lambda error: None):
        torch.ones(1) + 1
    assert inner.calls > calls


def test_operations_outside_all_modes_are_not_seen():
    mode, x = Mode(), torch.ones(1, requires_grad=True)
    with mode, private.outside_all_modes():
        calls = mode.calls
        y = x + 1
        assert mode.calls == calls
    assert not y.requires_grad


def test_fake_tensors_have_shapes_and_refuse_values():
    with private.fake_tensor_mode():
        x = torch.ones(3)
        assert private.is_fake(x)
        with pytest.raises(private.fake_tensor_refusals()):
            x.nonzero()
    assert private.is_fake(torch.ones(1, device="meta"))
    assert not private.is_fake(torch.ones(1))
    assert private.fake_tensor_mode().__class__.__module__ == private.FAKE_TENSOR_LOGGER


def test_reading_a_value_is_recognised():
    read = []

    class Watch(private.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            read.append(private.reads_a_value(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.ones(1).item()
    assert read.count(True) == 1


def test_a_log_softmax_node_tells_its_result():
    x = torch.randn(3, 5, requires_grad=True)
    result = x.log_softmax(-1)
    told = private.log_softmax_result(result.grad_fn)
    assert told is not None
    assert told[1] in (-1, 1)
    torch.testing.assert_close(told[0], result)
    assert private.log_softmax_result((x * 2).grad_fn) is None


def test_a_node_tells_the_shape_of_its_outputs():
    x = torch.randn(6, 5, requires_grad=True)
    assert private.output_shape((x * 2).grad_fn, 0) == (6, 5)
    part = x.split([2, 4])[1]
    assert private.output_shape(part.grad_fn, 1) == (4, 5)
    assert private.output_shape(object(), 0) is None


def test_forward_mode_is_seen():
    seen = []
    torch.func.jvp(lambda x: seen.append(private.in_forward_mode()) or x, (torch.ones(2),), (torch.ones(2),))
    with torch.autograd.forward_ad.dual_level():
        seen.append(private.in_forward_mode())
    assert [*seen, private.in_forward_mode()] == [True, True, False]


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_is_called_by_its_private_name(norm):
    called = []

    class Noted(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            called.append(func)
            return func(*args, **(kwargs or {}))

    layer = norm(nn.Linear(3, 2))
    with Noted():
        layer(torch.ones(1, 3))
    assert private.WEIGHT_NORM in called


def test_what_is_computed_again_is_so_inside_a_context():
    calls = []

    @contextmanager
    def context():
        calls.append("enter")
        yield
        calls.append("leave")

    def function(x):
        calls.append("call")
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    with private.recomputed_inside(context):
        y = checkpoint(function, x, use_reentrant=False)
    assert calls == ["call"]
    y.sum().backward()
    assert calls == ["call", "enter", "call"] or calls == ["call", "enter", "call", "leave"]
    checkpoint(function, x, use_reentrant=False).sum().backward()
    assert calls.count("enter") == 1
