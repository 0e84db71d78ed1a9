"""Runs a function on several ranks of a gloo group, each in a process of its own, and returns what each returned."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import set_forkserver_preload
from torch.multiprocessing.spawn import ProcessRaisedException, start_processes

from tests.poison import poison_fresh_memory

# Ranks are forked from one server that has imported what takes seconds to import. Nothing of ours is among it: the
# server would look for it without pytest's import path.
set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "pytest"])


def _rank(rank: int, work: Callable[..., Any], ranks: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    poison_fresh_memory(pytest.MonkeyPatch())
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    try:
        torch.save(work(*arguments), Path(folder) / f"{rank}.pt")
        dist.barrier()
    except Exception:
        # Before the group ends: after that other ranks fail too, and theirs would be the error that is reported.
        (Path(folder) / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()


def run_ranks(ranks: int, work: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """``work(*arguments)`` on each rank: a function of a module, whose result ``torch.save`` can write.

    Raises:
        TimeoutError: a rank hangs.
        RuntimeError: a rank raised; the message has the tracebacks of all that did.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = start_processes(
            _rank, (work, ranks, folder, arguments), nprocs=ranks, join=False, start_method="forkserver"
        )
        assert context is not None
        deadline = time.monotonic() + timeout
        try:
            while not context.join(timeout=max(deadline - time.monotonic(), 0.0)):
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"expected {ranks} ranks to end within {timeout:g} s")
        except ProcessRaisedException as error:
            raise RuntimeError("\n".join(file.read_text() for file in Path(folder).glob("*.error"))) from error
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
