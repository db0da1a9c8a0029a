"""Kernels and the functions that launch them.  Launchers allocate their outputs and never synchronise."""
