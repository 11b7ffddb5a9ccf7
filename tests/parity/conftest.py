"""What the parity tests share: the same random weights in two networks, the same noise in two samplers."""

import pytest


@pytest.fixture
def draw_weights():
    """A function (torch_model) that draws all weights anew, so that no 0 or 1 at the start hides a difference."""
    import torch

    def draw(torch_model):
        torch_model.eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for name, p in torch_model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
            if p.ndim > 1:
                p.mul_((p[0].numel()) ** -0.5)
            elif name.endswith("weight"):
                p.mul_(0.2).add_(1.0)
        return torch_model

    return draw


@pytest.fixture
def transplant(draw_weights):
    """A function (torch_model, our_module, *inputs, **inputs) -> our parameters, after `draw_weights` on the former."""
    import jax

    from ldm_jax.interop.diffusers import params_from_state_dict

    def give(torch_model, module, *args, **kwargs):
        state = {name: p.numpy() for name, p in draw_weights(torch_model).state_dict().items()}
        target = jax.eval_shape(module.init, jax.random.key(0), *args, **kwargs)["params"]
        return params_from_state_dict(state, target)

    return give


@pytest.fixture
def same_noise(monkeypatch):
    """A function (module, calls) that makes a scheduler draw our noise, call after call."""
    import torch
    from parity.fixed_network import row_noise

    def patch(module, calls):
        rows = iter(range(calls))
        name = f"diffusers.schedulers.scheduling_{module}.randn_tensor"
        monkeypatch.setattr(name, lambda *_, **__: torch.from_numpy(row_noise(next(rows))))

    return patch
