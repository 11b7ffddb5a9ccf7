"""PyTorch's worker: the same network as diffusers' UNet2DConditionModel, with usual PyTorch training and sampling."""

import sys
import time

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel

BATCH, STEPS, GUIDANCE = 128, 10, 1.5


def main(mode: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=7, in_channels=8, out_channels=8, layers_per_block=1, block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16,
    ).to(device, memory_format=torch.channels_last)  # fmt: skip
    embed = torch.nn.Embedding(11, 128).to(device)
    params = [*unet.parameters(), *embed.parameters()]
    ema_params = [p.detach().clone() for p in params]
    network = torch.compile(unet) if mode == "compile" else unet
    optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    noise = DDPMScheduler(beta_start=1e-4, beta_end=0.02)
    sampler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="trailing")
    z0 = torch.randn(BATCH, 8, 7, 7, device=device).contiguous(memory_format=torch.channels_last)
    label = torch.randint(0, 10, (BATCH,), device=device)

    def train() -> None:
        t, eps = torch.randint(0, 1000, (BATCH,), device=device), torch.randn_like(z0)
        dropped = torch.where(torch.rand(BATCH, device=device) < 0.1, 10, label)
        loss = ((network(noise.add_noise(z0, eps, t), t, embed(dropped)[:, None]).sample - eps) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(ema_params, params, 0.001)

    @torch.no_grad()
    def sample() -> None:
        sampler.set_timesteps(STEPS)
        z, context = torch.randn_like(z0), embed(torch.cat([label, torch.full_like(label, 10)]))[:, None]
        for t in sampler.timesteps:
            cond, null = network(torch.cat([z, z]), t.to(device), context).sample.chunk(2)
            z = sampler.step(null + GUIDANCE * (cond - null), t, z).prev_sample

    print(f"ready {sum(p.numel() for p in unet.parameters())}", flush=True)
    for line in sys.stdin:
        what, n = line.split()
        start = time.perf_counter()
        for _ in range(int(n)):
            train() if what == "train" else sample()
        if device == "cuda":
            torch.cuda.synchronize()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
