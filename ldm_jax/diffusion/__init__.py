"""The mathematics of diffusion: pure functions of arrays. Imports jax and numpy only; knows no network and no files."""
