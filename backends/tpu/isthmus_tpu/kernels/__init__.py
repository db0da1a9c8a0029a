"""Kernels in Pallas, each beside its reference in torch.  Importing a kernel's module imports jax."""
