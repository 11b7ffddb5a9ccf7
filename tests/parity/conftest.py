"""What the parity tests share: the same random weights in two networks, the same noise in two samplers."""

import pytest


@pytest.fixture
def random_weights():
    """A function (torch_model) that samples all weights, so that no initial 0 or 1 hides a difference."""
    import torch

    def sample(torch_model):
        torch_model.eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for name, p in torch_model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
            if p.ndim > 1:
                p.mul_((p[0].numel()) ** -0.5)
            elif name.endswith("weight"):
                p.mul_(0.2).add_(1.0)
        return torch_model

    return sample


@pytest.fixture
def transplant(random_weights):
    """A function (torch_model, our_module, *inputs, **inputs) -> our parameters, those of the former at random."""
    import jax

    from ldm_jax.interop.diffusers import params_from_state_dict

    def give(torch_model, module, *args, **kwargs):
        state = {name: p.numpy() for name, p in random_weights(torch_model).state_dict().items()}
        target = jax.eval_shape(module.init, jax.random.key(0), *args, **kwargs)["params"]
        return params_from_state_dict(state, target)

    return give


@pytest.fixture
def same_noise(monkeypatch):
    """A function (module, rows) that gives a scheduler our noise, of rows 0, 1, ... or of a range of them."""
    import torch
    from parity.fixed_network import row_noise

    def patch(module, calls):
        rows = iter(range(calls) if isinstance(calls, int) else calls)
        name = f"diffusers.schedulers.scheduling_{module}.randn_tensor"
        monkeypatch.setattr(name, lambda *_, **__: torch.from_numpy(row_noise(next(rows))))

    return patch
