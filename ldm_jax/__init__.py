"""Latent diffusion in JAX: pure functions for the mathematics, Flax modules for the networks, one loop for training."""
