"""Triton's real compiler and launcher without a GPU: kernels compile for an architecture, and launches do nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("cuda.c")

current = 0
"""Number of the current device, as ``torch.cuda.set_device`` would set it."""
streams: list[int] = []
"""Devices whose current stream was asked for, in order."""


def build(folder: Path) -> dict[str, str]:
    """Compile the library into ``folder``; the environment that a process needs to find it."""
    library = folder / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", str(library), str(SOURCE)], check=True)
    (folder / "libcuda.so").symlink_to(library)
    return {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": str(folder)}


class _Utilities:
    """What the driver tells of the device, and the entry points of Triton's launcher."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.nvidia.driver import CudaUtils

        real = CudaUtils()
        self.architecture = architecture
        for name in ("launch", "build_signature_metadata", "fill_tma_descriptor", "fill_tma_descriptor_tiled"):
            if hasattr(real, name):
                setattr(self, name, getattr(real, name))

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": 232_448, "multiprocessor_count": 132, "max_num_regs": 65_536, "warpSize": 32,
            "sm_clock_rate": 1_980_000, "mem_clock_rate": 3_200_000, "mem_bus_width": 6_144,
        }  # fmt: skip

    def load_binary(self, name: str, kernel: Any, shared: int, device: int) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        """Nothing was loaded."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: 1


def stream_of(device: int) -> int:
    streams.append(device)
    return 0


def activate(architecture: int = 90) -> None:
    """Make Triton of this process launch through the stub."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import GPUDriver
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.runtime import driver

    class Driver(GPUDriver):  # type: ignore[misc]  # untyped in triton
        def __init__(self) -> None:
            self.utils = _Utilities(architecture)
            self.launcher_cls = CudaLauncher
            self.get_current_device = lambda: current
            self.get_current_stream = stream_of
            self.set_current_device = lambda device: None
            self.get_device_capability = lambda device=0: (architecture // 10, architecture % 10)

        @staticmethod
        def is_active() -> bool:
            return True

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", architecture, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def map_python_to_cpp_type(self, kind: str) -> str:
            return kind

        def get_benchmarker(self) -> Any:
            return None

        def get_device_interface(self) -> Any:
            return torch.cpu

        def get_empty_cache_for_benchmark(self) -> torch.Tensor:
            return torch.empty(1)

        def clear_cache(self, cache: Any) -> None:
            """There is none."""

    driver.set_active(Driver())
