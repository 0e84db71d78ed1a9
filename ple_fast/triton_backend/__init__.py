"""The arithmetic in Triton kernels: ``level.py`` runs a whole extraction network, forward and backward.

The kernels are ``ple_fast_kernels``, norms and dropout among them; layers whose activation has learned parameters run all
that follows the product in the operators of ``torch_backend``. Imported at the first call that needs it: triton is optional.
"""
