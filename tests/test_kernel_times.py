"""Kernels of a trace by kind, and their picture."""

import pytest

from disag_jax import kernel_times, trace
from disag_jax.errors import ConfigError

KERNELS = [
    ("/device:GPU:1", "multiply_by_group_mosaic_gpu_kernel", 0, 500_000),
    ("/device:GPU:1", "weight_gradient_mosaic_gpu_kernel", 500_000, 900_000),
    ("/device:GPU:0", "ncclDevKernel_SendRecv(x)", 100_000, 400_000),
    ("/device:GPU:0", "cudnn_generated_fort_native_sdpa_sm90_flash_bprop", 0, 300_000),
    ("/device:GPU:0", "nvjet_sm90_tst_256x128", 300_000, 1_000_000),
    ("/device:GPU:0", "loop_add_fusion_3", 1_000_000, 1_200_000),
]


def test_every_kernel_counts_once():
    found = kernel_times.seconds_by_kind(KERNELS)
    assert list(found) == ["/device:GPU:0", "/device:GPU:1"]
    expected = {
        "communication": 3e-4, "attention": 3e-4, "dense products": 7e-4, "all else": 2e-4,
    }  # fmt: skip
    kept = {kind: seconds for kind, seconds in found["/device:GPU:0"].items() if seconds}
    assert kept == pytest.approx(expected)
    kept = {kind: seconds for kind, seconds in found["/device:GPU:1"].items() if seconds}
    assert kept == pytest.approx(
        {"rows times expert weights": 5e-4, "expert weight gradients": 4e-4}
    )


def test_table_and_picture(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(trace, "kernels", lambda _: KERNELS)
    kernel_times.main("runs", str(tmp_path / "kernels.png"), 0.5, 0.5)
    assert "0.001" in capsys.readouterr().out
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"--plot = .* must be a picture that can be written"):
        kernel_times.main("runs", str(tmp_path / "none" / "kernels.png"), 0.5, 0.5)
    with pytest.raises(ConfigError, match=r"--plot = .* must be a picture that can be written"):
        kernel_times.main("runs", str(tmp_path / "kernels.words"), 0.5, 0.5)


def test_a_directory_without_a_trace_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="must hold the trace of a GPU"):
        kernel_times.main(str(tmp_path), None, 30, 0.5)
