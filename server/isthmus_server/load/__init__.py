"""Loads for measuring: seeded requests, a light client that sends them, and the figures."""
