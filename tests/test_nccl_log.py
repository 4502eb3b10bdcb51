"""What NCCL's own log says decides whether a run used sockets."""

import os

import pytest

from disag_jax import nccl_log
from disag_jax.errors import RunError
from mesh import runtime

SOCKET = "NCCL INFO Channel 00/0 : 0[0] -> 1[1] [send] via NET/Socket/0\n"


def test_every_channel_must_be_a_socket(tmp_path):
    log = tmp_path / "run.nccl.1.txt"
    log.write_text(SOCKET)
    nccl_log.check_sockets(f"{tmp_path}/run.nccl.*.txt", "run")
    log.write_text(SOCKET + "NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM\n")
    with pytest.raises(RunError, match=r"run: .* its log names NET/Socket/0, P2P/CUMEM"):
        nccl_log.check_sockets(f"{tmp_path}/run.nccl.*.txt", "run")
    with pytest.raises(RunError, match="its log names no channel"):
        nccl_log.check_sockets(f"{tmp_path}/none", "run")


def test_a_process_reads_its_own_log(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG_FILE", f"{tmp_path}/%h.%p")
    nccl_log.check_network("default")
    with pytest.raises(RunError, match=r"--network=sockets: .* no channel"):
        nccl_log.check_network("sockets")
    (tmp_path / f"host.{os.getpid()}").write_text(SOCKET)
    nccl_log.check_network("sockets")


def test_a_named_network_writes_the_log(monkeypatch):
    for name in (*runtime.NETWORK_LOG, *runtime.SOCKETS, "XLA_FLAGS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    # Less than what is checked for.
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    runtime.start(0, network="sockets")
    assert os.environ["NCCL_DEBUG"] == "INFO" and "%p" in os.environ["NCCL_DEBUG_FILE"]
