"""A level as one operator of ``torch.library``, for compilers and, on the Triton backend, export."""

from .operators import run_op

__all__ = ["run_op"]
