"""Mixed precision and the optimiser's step on one process, and how several processes meet."""

from __future__ import annotations

import socket
import sys
import time
from datetime import timedelta
from subprocess import run

import pytest
import torch
from tests.processes import finish, free_port, ranks, start
from torch import nn

from nearkin import distributed
from nearkin.cli import run as command
from nearkin.device import choose_precision
from nearkin.distributed import Runtime
from nearkin.errors import ConfigError, ProcessHangs
from nearkin.process import GPU_THREADS, Launch
from nearkin.types import Outputs


def trained(runtime, steps, max_norm=None, poison=None):
    """Weights after some steps of SGD on a fixed quadratic problem, and the largest gradient norms."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(8, 6, generator=generator)
    for step in range(steps):
        with runtime.autocast():
            y = layer(x)
        loss = y.float().square().mean() * (float("inf") if step == poison else 1)
        runtime.backward(loss)
        runtime.step(optimizer, max_norm)
        assert all(p.grad is None for p in layer.parameters())
    return torch.cat([p.detach().flatten() for p in layer.parameters()])


@pytest.mark.parametrize(("max_norm", "tolerance"), [(None, 2e-3), (0.05, 2e-4)])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_takes_the_same_steps(precision, tolerance, max_norm):
    exact = trained(Runtime(device="cpu", precision="fp32"), 5, max_norm)
    none = trained(Runtime(device="cpu", precision="fp32"), 0, max_norm)
    assert float((none - exact).abs().max()) > 10 * tolerance
    mixed = trained(Runtime(device="cpu", precision=precision), 5, max_norm)
    assert not torch.equal(mixed, exact)
    torch.testing.assert_close(mixed, exact, rtol=0, atol=tolerance)


def test_an_fp16_step_with_an_infinite_gradient_is_skipped_and_lowers_the_scale():
    runtime = Runtime(device="cpu", precision="fp16")
    scale = runtime.scaler.get_scale()
    torch.testing.assert_close(
        trained(runtime, 3, poison=1), trained(runtime, 2), rtol=0, atol=1e-6
    )
    assert runtime.scaler.get_scale() == scale / 2
    other = Runtime(device="cpu", precision="fp16")
    other.scaler.load_state_dict(runtime.scaler.state_dict())
    assert other.scaler.state_dict() == runtime.scaler.state_dict()


def test_only_fp16_has_a_scaler():
    for precision in ("fp32", "bf16", "fp64"):
        assert Runtime(device="cpu", precision=precision).scaler.state_dict() == {}
    assert Runtime(device="cpu", precision="fp32").at("fp16").scaler.state_dict() != {}


class Heads(nn.Module):
    def forward(self, images):
        features = images @ torch.ones(3, 2, dtype=images.dtype)
        return Outputs(features, features, None, features)


def test_outputs_have_the_dtype_of_the_run():
    for precision, dtype in (("bf16", torch.float32), ("fp64", torch.float64)):
        runtime = Runtime(device="cpu", precision=precision)
        outputs = runtime.forward(Heads(), torch.ones(5, 3, dtype=dtype))
        assert outputs.features.dtype == outputs.logits.dtype == dtype
        assert outputs.projection is None


def test_torch_has_few_threads_beside_a_gpu_and_its_own_afterwards(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    given, back = torch.tensor([3]), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: given)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, _: back.append(state))
    torch.set_num_threads(6)
    try:
        with Runtime(device="cuda", precision="fp32"):
            assert torch.get_num_threads() == GPU_THREADS < 6
        assert torch.get_num_threads() == 6
        with Runtime(device="cpu", precision="fp32"):
            torch.set_num_threads(1)  # as --threads does
        assert torch.get_num_threads() == 6
        with pytest.raises(ConfigError), Runtime(device="cuda", precision="fp32"):
            raise ConfigError("no")
        assert torch.get_num_threads() == 6
        assert [state is given for state in back] == [True, True]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp16")])
def test_bf16_is_chosen_where_the_gpu_has_it(native, precision, monkeypatch):
    def supported(including_emulation=True):
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert choose_precision("auto", "cuda") == precision


def test_a_second_run_can_start_in_the_same_process():
    with Runtime(device="cpu", precision="fp32") as runtime:
        assert runtime.collect(1) == [1]
    with Runtime(device="cpu", precision="fp32") as runtime:
        assert runtime.once_per_node(lambda: "made") == runtime.share("made") == "made"


def test_a_failure_on_one_process_of_a_node_is_raised_on_all(monkeypatch):
    def failing():
        raise ConfigError("no room")

    with Runtime(device="cpu", precision="fp32") as runtime:
        with pytest.raises(ConfigError, match="no room"):
            runtime.once_per_node(failing)
        monkeypatch.setattr(runtime, "local_rank", 1)
        monkeypatch.setattr(runtime, "collect", lambda _: [(None, ConfigError("there")), (1, None)])
        with pytest.raises(ConfigError, match="there"):
            runtime.once_per_node(failing)


def meeting(address, port):
    """What process 0 of 2 does first."""
    return distributed._connect(Launch(1, 2, address=address, port=port), holds=True)


def waiting():
    distributed.STEP_TIMEOUT = timedelta(seconds=2)
    try:
        with Runtime(device="cpu", precision="fp32") as runtime:
            if runtime.rank == 1:
                time.sleep(60)
            distributed.sum_over_ranks(torch.ones(2))
    except ProcessHangs as error:
        print(error, flush=True)
        sys.exit(error.code)


def test_a_process_that_hangs_in_a_step_ends_all_as_resumable(tmp_path):
    """A scheduler starts the run again; it is no bug."""
    logs = [tmp_path / name for name in ("0.txt", "1.txt")]
    started = [start(waiting, env=env, log=log) for env, log in zip(ranks(2), logs, strict=True)]
    assert finish(*started) == [75, 75]
    assert "did not answer for 0.0333333 minutes" in logs[0].read_text()


def test_a_port_that_is_in_use_is_said(monkeypatch):
    monkeypatch.setattr(distributed, "STARTING", 0.5)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"MASTER_PORT {port} \(address already in use\)"):
            meeting("127.0.0.1", port)
    assert meeting("127.0.0.1", port).port == port


def test_an_unknown_name_is_said_soon_and_may_become_known_late(monkeypatch):
    known, looked = 2, []

    def look_up(*_):
        looked.append(1)
        if len(looked) < known:
            raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    port = free_port()
    assert meeting("127.0.0.1", port).port == port
    assert distributed.STARTING < 20
    monkeypatch.setattr(distributed, "STARTING", 0.5)
    known = 1000
    with pytest.raises(ConfigError, match=r"MASTER_ADDR gpu7, .* \(\[Errno -2\] Name or"):
        meeting("gpu7", port)


def test_an_error_before_the_start_is_said_where_no_other_process_can_be_reached(
    monkeypatch, capsys
):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        for name, value in ranks(2)[0].items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        monkeypatch.setattr(distributed, "STARTING", 0.5)
        monkeypatch.setattr(distributed.Failures, "runs", 0)
        assert command(["train", "--zzz"]) == 2
    assert capsys.readouterr().err.startswith("nearkin: error: Unknown option --zzz.")


def test_one_process_loads_neither_fabric_nor_the_compiler():
    code = (
        "import sys; from nearkin.distributed import Runtime; Runtime(device='cpu', precision='bf16'); "
        "print([m for m in ('lightning_fabric', 'torch._dynamo') if m in sys.modules])"
    )
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
