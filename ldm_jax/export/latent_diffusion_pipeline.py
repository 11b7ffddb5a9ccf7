"""Draws with a latent diffusion model that ldm_jax trained, in PyTorch: diffusers loads this file with the model.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    images = pipe([0, 3, 3]).images
    images = pipe(num_images=4, known=...).images    a model that restores pictures, of what is known of them

A picture is drawn as in ldm_jax: by the scheduler of the folder, with classifier-free guidance. What is left out in a
call is as the model's config had it, and as model_index.json says.
"""

import inspect
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel, VQModel
from diffusers.schedulers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

# What a model of each kind of map must be given as `known`.
KNOWN = {
    "low_resolution": "the small picture",
    "inpainting": "the picture and the mask, white where it is drawn: a pair",
    "segments": "the map of class numbers",
}
Picture = Image.Image | np.ndarray


class LatentDiffusionPipeline(DiffusionPipeline):
    """A UNet on the latents of an autoencoder, told of a class or of none.

    Args:
      unet: what it is told of K classes with L tokens each are one-hot vectors [B, L, (K + 1) L]; the rows that they
        select, tau(y), are the weights of its `encoder_hid_proj`. The last class stands for none.
      scheduler: any of diffusers'.
      vae: the autoencoder; None for a model of pixels.
      id2label: number of a class -> its name; None for a model without classes.
      class_tokens: L.
      latents_shift, latents_scale: of each channel; the UNet sees z = (raw - shift) * scale.
      num_inference_steps, guidance_scale, eta: as in `__call__`.
      guidance_interval: the share of the timesteps, from and to, that guidance acts on.
      guidance_rescale: how far guidance may not change the contrast: 0 freely, 1 not at all (Lin et al. 2023).
      map_kind: of the map that the UNet sees beside the latents (Rombach et al. 2022, section 3.3), a key of KNOWN, or
        "none".
      map_channels: of that map, the last of the UNet's input; of segments the number of their classes.
      map_size: height and width of the known pictures.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ("vae",)

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | VQModel | None = None,
        id2label: dict[str, str] | None = None,
        class_tokens: int = 1,
        latents_shift: Sequence = (0.0,),
        latents_scale: Sequence = (1.0,),
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_interval: Sequence = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        eta: float = 0.0,
        map_kind: str = "none",
        map_channels: int = 0,
        map_size: Sequence = (0, 0),
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.register_to_config(
            id2label=id2label or {},
            class_tokens=class_tokens,
            latents_shift=list(latents_shift),
            latents_scale=list(latents_scale),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_interval=list(guidance_interval),
            guidance_rescale=guidance_rescale,
            eta=eta,
            map_kind=map_kind,
            map_channels=map_channels,
            map_size=list(map_size),
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_images: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
        known: Picture | Sequence | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draws a picture of each class.

        Args:
          class_labels: classes by number or name, one picture each; None: `num_images` pictures of no class.
          num_inference_steps: of the scheduler.
          guidance_scale: of classifier-free guidance; 1 = none.
          eta: of DDIM, 0 deterministic to 1 ancestral.
          latents: the noise to begin with, [B, c, h, w] of unit variance.
          generator: of the noise.
          num_images: how many, without classes.
          output_type: "pil", "np" ([B, H, W, C] in [0, 1]) or "pt" ([B, C, H, W] in [0, 1]).
          return_dict: whether to return an ImagePipelineOutput rather than a tuple.
          known: what is known of the picture, if the model takes a map: see KNOWN. Each a PIL image or uint8 [H, W] or
            [H, W, C] of the model's map_size, once for all, or a list of one for each. A mask may be bool, too.
        """
        labels = self.numbers_of(class_labels, num_images)
        scale = self._or_config("guidance_scale", guidance_scale) if class_labels is not None else 1.0
        told, nothing = self.one_hot(labels), self.one_hot([len(self.config.id2label)] * len(labels))

        unet, scheduler, device = self.unet, self.scheduler, self._execution_device
        given = self.read_known(known, len(labels))
        beside = self.make_map(given).to(unet.dtype).expand(len(labels), -1, -1, -1)
        c = unet.config.in_channels - self.config.map_channels
        shape = (len(labels), c, unet.config.sample_size, unet.config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=unet.dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents must be of shape {list(shape)}; got {list(latents.shape)}")

        scheduler.set_timesteps(self._or_config("num_inference_steps", num_inference_steps), device=device)
        z = latents.to(device, unet.dtype) * self.first_scale()
        takes = inspect.signature(scheduler.step).parameters
        wanted = {"eta": self._or_config("eta", eta), "generator": generator, "use_clipped_model_output": True}
        options = {name: value for name, value in wanted.items() if name in takes}
        for t in self.progress_bar(scheduler.timesteps):
            output = self.predict(scheduler.scale_model_input(z, t), t, beside, told, nothing, scale)
            if scheduler.config.get("variance_type") not in ("learned", "learned_range"):
                output = output[:, :c]  # without the variance, if it was learned
            z = scheduler.step(output, t, z, **options, return_dict=False)[0]

        images = self.decode(z)
        if self.config.map_kind == "inpainting":  # what is known stays as it is, to the bit
            picture, mask = given
            images = torch.where(mask, images.float(), picture / 255)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images) if return_dict else (images,)

    def numbers_of(self, class_labels: int | str | Sequence[int | str] | None, num_images: int) -> list[int]:
        """The numbers of classes; the one behind the last stands for none."""
        names = {name: int(number) for number, name in self.config.id2label.items()}
        if class_labels is None:
            return [len(names)] * num_images
        alone = isinstance(class_labels, int | str)
        numbers = [names.get(label, label) for label in ([class_labels] if alone else class_labels)]
        for number in numbers:
            if isinstance(number, str) or not 0 <= number < len(names):
                raise ValueError(f"{number!r} is no class; there are {names}")
        return [int(number) for number in numbers]

    def one_hot(self, labels: list[int]) -> torch.Tensor:
        """What the UNet is told of classes: [B, L, (K + 1) L]."""
        length, width = self.config.class_tokens, self.unet.config.encoder_hid_dim
        rows = torch.tensor(labels)[:, None] * length + torch.arange(length)
        return torch.nn.functional.one_hot(rows, width).to(self._execution_device, self.unet.dtype)

    def first_scale(self) -> float | torch.Tensor:
        """What unit noise is multiplied by; schedulers of k-diffusion's kind hold z / alpha, alpha^-2 = 1 + sigma^2."""
        return 1.0 if self.scheduler.init_noise_sigma == 1 else (1 + self.scheduler.sigmas[0] ** 2) ** 0.5

    def predict(
        self,
        z: torch.Tensor,
        t: torch.Tensor,
        beside: torch.Tensor,
        told: torch.Tensor,
        nothing: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """The UNet's output under classifier-free guidance (Ho & Salimans 2022); a learned variance is not guided."""
        seen = torch.cat([z, beside], dim=1)
        first, last = (share * self.scheduler.config.num_train_timesteps for share in self.config.guidance_interval)
        if scale == 1 or not first <= t <= last:
            return self.unet(seen, t, told).sample
        with_class, without = self.unet(torch.cat([seen, seen]), t, torch.cat([told, nothing])).sample.chunk(2)
        c = z.shape[1]
        guided = without[:, :c] + scale * (with_class[:, :c] - without[:, :c])
        if self.config.guidance_rescale:
            ratio = with_class[:, :c].std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
            guided = guided * (1 + self.config.guidance_rescale * (ratio - 1))
        return torch.cat([guided, with_class[:, c:]], dim=1)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Scaled latents to pictures in [0, 1]; of a model of pixels they are the pictures."""
        if self.vae is not None:
            shift, scale = self.latents_scaling()
            z = self.vae.decode((z / scale + shift).to(self.vae.dtype)).sample
        return (z / 2 + 0.5).clamp(0, 1)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures in [-1, 1] to the most likely scaled latents, float32; those of a model of pixels are x itself."""
        if self.vae is None:
            return x
        found = self.vae.encode(x.to(self.vae.dtype))
        raw = found.latents if isinstance(self.vae, VQModel) else found.latent_dist.mode()
        shift, scale = self.latents_scaling()
        return (raw.float() - shift) * scale

    def latents_scaling(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Shift and scale, each [1, c, 1, 1] float32."""
        shift, scale = (
            torch.tensor(values, dtype=torch.float32, device=self._execution_device).view(1, -1, 1, 1)
            for values in (self.config.latents_shift, self.config.latents_scale)
        )
        return shift, scale

    def read_known(self, known: Picture | Sequence | None, number: int) -> tuple[torch.Tensor, ...]:
        """What is known of `number` pictures, uint8 [1 or number, C, H, W], and a mask as bool; () without a map.

        Raises:
          ValueError: it is missing, or not what the model takes.
        """
        kind, channels = self.config.map_kind, self.config.map_channels
        if kind == "none":
            if known is not None:
                raise ValueError("this model takes no map, so that nothing can be known of the picture")
            return ()
        if known is None or (kind == "inpainting" and not (isinstance(known, list | tuple) and len(known) == 2)):
            raise ValueError(f"known must be {KNOWN[kind]}")
        if kind == "low_resolution":
            return (self.read_pictures(known, channels, number),)
        if kind == "inpainting":
            seen = self.unet.config.in_channels - channels if self.vae is None else self.vae.config.in_channels
            picture, mask = known
            return self.read_pictures(picture, seen, number), self.read_pictures(mask, 1, number) >= 128
        segments = self.read_pictures(known, 0, number)
        if segments.max() >= channels:
            raise ValueError(f"known has a pixel of class {segments.max()}; the model knows 0 to {channels - 1}")
        return (segments,)

    def read_pictures(self, given: Picture | Sequence, channels: int, number: int) -> torch.Tensor:
        """One picture or `number` of them with 1 or 3 channels, or with 0 maps of classes: uint8 [B, C, H, W]."""
        several = isinstance(given, list | tuple) or np.ndim(given) == 4
        arrays = [as_array(picture, channels) for picture in (given if several else [given])]
        if len(arrays) not in (1, number):
            raise ValueError(f"known has {len(arrays)} pictures; it must have one for all or one for each of {number}")
        shape = (*self.config.map_size, channels or 1)
        for array in arrays:
            if array.shape != shape or array.dtype != np.uint8:
                raise ValueError(f"known has {array.dtype}{list(array.shape)}; it must have uint8{list(shape)}")
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(self._execution_device)

    def make_map(self, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """What the UNet sees of what `read_known` gave: [B, map_channels, h, w] float32."""
        kind, side = self.config.map_kind, self.unet.config.sample_size
        if kind == "none":
            return torch.zeros(1, 0, side, side, device=self._execution_device)
        if kind == "inpainting":
            picture, mask = given
            step = mask.shape[-1] // side
            z = self.encode((picture / 127.5 - 1) * ~mask)
            small = mask[:, :, ::step, ::step].float()
            number = max(len(small), len(z))
            return torch.cat([part.expand(number, -1, -1, -1) for part in (small, z)], dim=1)
        # Antialiased, torch's filters are those of jax.image.resize; its other bicubic has another coefficient.
        if kind == "low_resolution":
            return resized(given[0] / 127.5 - 1, side, "bicubic")
        one_hot = torch.nn.functional.one_hot(given[0][:, 0].long(), self.config.map_channels)
        return resized(one_hot.permute(0, 3, 1, 2).float(), side, "bilinear")

    def _or_config(self, name: str, value: float | None) -> float:
        return self.config[name] if value is None else value


def resized(x: torch.Tensor, side: int, mode: str) -> torch.Tensor:
    """x [B, C, H, W] as [B, C, side, side]."""
    return torch.nn.functional.interpolate(x, (side, side), mode=mode, antialias=True)


def as_array(picture: Picture, channels: int) -> np.ndarray:
    """[H, W, C]: a picture with 1 (grey) or 3 channels (RGB), laid on white, or with 0 the class numbers in it."""
    if isinstance(picture, Image.Image):
        if channels:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture).convert("L" if channels == 1 else "RGB")
        elif picture.mode not in ("L", "P", "1"):
            raise ValueError(f"a map of classes must be grey or have a palette, not {picture.mode}")
        picture = np.array(picture, np.uint8)
    array = np.asarray(picture)
    array = array[..., None] if array.ndim == 2 else array
    return array * np.uint8(255 if channels else 1) if array.dtype == bool else array
