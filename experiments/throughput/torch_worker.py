"""PyTorch's worker: diffusers' UNet2DConditionModel with usual training and sampling; see `worker.serve`."""

import sys
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel

from experiments.throughput.networks import NETWORKS, POOLED, TIME_IDS, Network
from experiments.throughput.worker import serve

TORCH_COMPILE = {"compile": None, "reduce-overhead": "reduce-overhead"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def conditions(network: Network, rows: int) -> dict[str, Any]:
    """The UNet's arguments: random text embeddings of `rows` examples."""
    dim = network.config["cross_attention_dim"]
    arguments = {"encoder_hidden_states": torch.randn(rows, network.tokens, dim, device=DEVICE)}
    if network.added:
        text, time_ids = torch.randn(rows, POOLED, device=DEVICE), torch.ones(rows, TIME_IDS, device=DEVICE)
        arguments["added_cond_kwargs"] = {"text_embeds": text, "time_ids": time_ids}
    return arguments


def cast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: cast(each, dtype) if isinstance(each, dict) else each.to(dtype) for name, each in arguments.items()}


class Work:
    """Training and sampling of one network at one batch size."""

    def __init__(self, name: str, batch: int, dtype: torch.dtype, mode: str, what: str) -> None:
        self.network, self.batch, self.dtype = NETWORKS[name], batch, dtype
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**self.network.config).to(DEVICE, memory_format=torch.channels_last)
        self.params = sum(p.numel() for p in unet.parameters())
        if what == "sample":
            unet = unet.to(dtype).eval()
        else:
            self.ema = [p.detach().clone() for p in unet.parameters()]
            betas = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}
            self.optimizer = torch.optim.AdamW(unet.parameters(), fused=True, **betas)
        self.unet, self.apply = unet, unet if mode == "eager" else torch.compile(unet, mode=TORCH_COMPILE[mode])
        size, channels = self.network.config["sample_size"], unet.config.in_channels
        self.z0 = torch.randn(batch, channels, size, size, device=DEVICE).contiguous(memory_format=torch.channels_last)
        self.noise = DDPMScheduler(beta_start=1e-4, beta_end=0.02)
        self.sampler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="trailing")
        self.sampler.set_timesteps(self.network.steps)
        self.cond = conditions(self.network, batch if what == "train" else 2 * batch)

    def train(self) -> None:
        t, eps = torch.randint(0, 1000, (self.batch,), device=DEVICE), torch.randn_like(self.z0)
        z_t = self.noise.add_noise(self.z0, eps, t)
        autocast = nullcontext() if self.dtype == torch.float32 else torch.autocast(DEVICE, self.dtype)
        with autocast:
            output = self.apply(z_t, t, **self.cond).sample
        loss = ((output.float() - eps) ** 2).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, list(self.unet.parameters()), 0.001)

    @torch.no_grad()
    def sample(self) -> None:
        z, arguments = torch.randn_like(self.z0).to(self.dtype), cast(self.cond, self.dtype)
        for t in self.sampler.timesteps:
            cond, null = self.apply(torch.cat([z, z]), t.to(DEVICE), **arguments).sample.chunk(2)
            z = self.sampler.step(null + self.network.scale * (cond - null), t, z).prev_sample

    def wait(self) -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> int:
        return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0


def main(what: str, name: str, batch: str, dtype: str, mode: str) -> None:
    work = Work(name, int(batch), getattr(torch, dtype), mode, what)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    about = {"parameters": work.params, "device": device, "version": f"torch {torch.__version__}"}
    serve(getattr(work, what), work.wait, work.memory, about)


if __name__ == "__main__":
    main(*sys.argv[1:])
