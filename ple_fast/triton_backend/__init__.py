"""The arithmetic in Triton kernels: ``level.py`` runs a whole extraction network, forward and backward.

The kernels are ``ple_fast_kernels``; norms, dropout and activations with learned parameters run between them in the
operators of ``torch_backend``. Imported at the first call that needs it: triton is optional.
"""
