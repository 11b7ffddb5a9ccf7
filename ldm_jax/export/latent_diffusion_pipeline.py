"""The diffusers pipeline of latent diffusion models from ldm_jax, in PyTorch; it is copied into the model's folder.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    images = pipe([0, 3, 3]).images                                class labels
    images = pipe(num_images=4, image=..., mask_image=...).images  concat conditioning, here inpainting

Samples are those of ldm_jax: with the folder's scheduler and classifier-free guidance, or autoguidance if there is a
guide_unet. The defaults of a call are in model_index.json, from the config of the training run.
"""

import inspect
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel, VQModel
from diffusers.schedulers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

# map_kind, the type of concat conditioning -> the inputs of a call.
INPUTS = {
    "low_resolution": "image must be the low-resolution image, mask_image None",
    "inpainting": "image and mask_image must be the image and its mask, white where it is sampled",
    "segments": "image must be the segmentation map of class numbers, mask_image None",
}
ImageInput = Image.Image | np.ndarray | Sequence


class LatentDiffusionPipeline(DiffusionPipeline):
    """Latent diffusion: a UNet on an autoencoder's latents, conditional on classes or unconditional.

    Args:
      unet: of K classes with L tokens each it takes one-hot vectors [B, L, (K + 1) L]; its `encoder_hid_proj` holds the
        class embedding tau(y), whose last class is the null condition.
      scheduler: any of diffusers.
      vae: the autoencoder; None for a model of pixels.
      guide_unet: the weaker UNet of autoguidance (Karras et al. 2024): a scale above 1 guides away from its output for
        the null condition; None: away from that of `unet`, classifier-free guidance.
      id2label: class number -> class name; None for an unconditional model.
      class_tokens: L.
      latents_shift, latents_scale: by channel; the UNet's latents are z = (raw - shift) * scale.
      num_inference_steps, guidance_scale, eta: as in `__call__`.
      guidance_interval: the part of the timesteps with guidance, from and to, in [0, 1].
      guidance_rescale: strength of the rescaling of guided outputs, 0 none to 1 full (Lin et al. 2023, section 3.4).
      map_kind: type of concat conditioning (Rombach et al. 2022, section 3.3), a key of INPUTS, or "none".
      map_channels: its number of channels, the last of the UNet's input; of segments the number of their classes.
      map_size: height and width of the conditioning image.
      timestep_offset: added to the scheduler's timestep for the UNet: -1 of rectified flow with T timesteps, whose UNet
        is conditioned on t = T sigma - 1.
      timestep_spacing: "trailing" steps of rectified flow, T, T - T / n ..., rounded; None: those of the scheduler.
    """

    model_cpu_offload_seq = "unet->guide_unet->vae"
    _optional_components = ("vae", "guide_unet")

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
        timestep_offset: int = 0,
        timestep_spacing: str | None = None,
        guide_unet: UNet2DConditionModel | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, guide_unet=guide_unet)
        self.register_to_config(
            id2label=id2label or {}, class_tokens=class_tokens, latents_shift=list(latents_shift),
            latents_scale=list(latents_scale), num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            guidance_interval=list(guidance_interval), guidance_rescale=guidance_rescale, eta=eta, map_kind=map_kind,
            map_channels=map_channels, map_size=list(map_size), timestep_offset=timestep_offset,
            timestep_spacing=timestep_spacing,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        latents: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_images: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Samples an image for each class label.

        Args:
          class_labels: numbers or names of classes; None: `num_images` unconditional samples.
          num_inference_steps: of the scheduler.
          guidance_scale: of classifier-free guidance or autoguidance; 1 = none.
          eta: of DDIM, 0 deterministic to 1 ancestral.
          latents: initial noise of unit variance, [B, c, h, w].
          generator: of the noise.
          num_images: number of samples without class labels.
          output_type: "pil", "np" ([B, H, W, C] in [0, 1]) or "pt" ([B, C, H, W] in [0, 1]).
          return_dict: whether to return an ImagePipelineOutput rather than a tuple.
          image, mask_image: of concat conditioning, see INPUTS: PIL images or uint8 [H, W] or [H, W, C] of the size
            `map_size`, one for all samples or a list of one for each. A mask may also be bool.

        Raises ValueError: an unknown class, latents of another shape, or images that the model does not take.
        """
        labels = self.class_numbers(class_labels, num_images)
        scale = self._or_config("guidance_scale", guidance_scale) if class_labels is not None else 1.0
        cond, null_cond = self.one_hot(labels), self.one_hot([len(self.config.id2label)] * len(labels))

        unet, scheduler, device = self.unet, self.scheduler, self._execution_device
        inputs = self.read_inputs(image, mask_image, len(labels))
        z_concat = self.encode_concat(inputs).to(unet.dtype).expand(len(labels), -1, -1, -1)
        c = unet.config.in_channels - self.config.map_channels
        shape = (len(labels), c, unet.config.sample_size, unet.config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=unet.dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents must be of shape {list(shape)}; got {list(latents.shape)}")

        self.set_timesteps(self._or_config("num_inference_steps", num_inference_steps))
        z = latents.to(device, unet.dtype) * self.init_noise_scale()
        options = {"eta": self._or_config("eta", eta), "generator": generator, "use_clipped_model_output": True}
        parameters = inspect.signature(scheduler.step).parameters
        options = {name: value for name, value in options.items() if name in parameters}
        for t in self.progress_bar(scheduler.timesteps):
            scaled = scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z
            unet_input = torch.cat([scaled, z_concat], dim=1)
            output = self.predict(unet_input, t + self.config.timestep_offset, cond, null_cond, scale)
            if scheduler.config.get("variance_type") not in ("learned", "learned_range"):
                output = output[:, :c]  # without a learned variance
            z = scheduler.step(output, t, z, **options, return_dict=False)[0]

        images = self.decode(z)
        if self.config.map_kind == "inpainting":  # the known pixels are kept exactly
            image, mask = inputs
            images = torch.where(mask, images.float(), image / 255)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images) if return_dict else (images,)

    def class_numbers(self, class_labels: int | str | Sequence[int | str] | None, num_images: int) -> list[int]:
        """The class numbers of labels; that of the null condition, K, without labels."""
        names = {name: int(number) for number, name in self.config.id2label.items()}
        if class_labels is None:
            return [len(names)] * num_images
        labels = [class_labels] if isinstance(class_labels, int | str) else class_labels
        numbers = [names.get(label, label) for label in labels]
        for number in numbers:
            if isinstance(number, str) or not 0 <= number < len(names):
                raise ValueError(f"class label {number!r} is no class of this model; it has {names}")
        return [int(number) for number in numbers]

    def one_hot(self, labels: list[int]) -> Tensor:
        """The UNet's encoder_hidden_states for class numbers: one-hot vectors [B, L, (K + 1) L]."""
        length, width = self.config.class_tokens, self.unet.config.encoder_hid_dim
        rows = torch.tensor(labels)[:, None] * length + torch.arange(length)
        return torch.nn.functional.one_hot(rows, width).to(self._execution_device, self.unet.dtype)

    def set_timesteps(self, steps: int) -> None:
        """Sets the scheduler's timesteps."""
        scheduler, device, T = self.scheduler, self._execution_device, self.scheduler.config.num_train_timesteps
        if self.config.timestep_spacing == "trailing":
            sigmas = np.round(np.arange(T, 0, -T / steps)[:steps]) / T
            scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            scheduler.set_timesteps(steps, device=device)

    def init_noise_scale(self) -> float | Tensor:
        """The initial noise's scale: schedulers of k-diffusion hold z / alpha, with alpha^-2 = 1 + sigma^2."""
        return (
            1.0 if getattr(self.scheduler, "init_noise_sigma", 1) == 1 else (1 + self.scheduler.sigmas[0] ** 2) ** 0.5
        )

    def predict(self, unet_input: Tensor, t: Tensor, cond: Tensor, null_cond: Tensor, scale: float) -> Tensor:
        """The UNet's output [B, C, h, w] with classifier-free guidance (Ho & Salimans 2022), but of a learned variance.

        With a guide_unet and a scale above 1, with autoguidance (Karras et al. 2024).

        Args:
          unet_input: latents and concat conditioning [B, c + map_channels, h, w].
          t: scalar, a timestep.
          cond, null_cond: [B, L, (K + 1) L].
          scale: guidance scale.
        """
        first, last = (part * self.scheduler.config.num_train_timesteps for part in self.config.guidance_interval)
        if scale == 1 or not first <= max(t, 0) <= last:  # rectified flow is sampled at t < 0 too
            return self.unet(unet_input, t, cond).sample
        if self.guide_unet is not None and scale > 1:
            conditional = self.unet(unet_input, t, cond).sample
            unconditional = self.guide_unet(unet_input, t, null_cond).sample
        else:
            both = self.unet(torch.cat([unet_input, unet_input]), t, torch.cat([cond, null_cond])).sample
            conditional, unconditional = both.chunk(2)
        c = unet_input.shape[1] - self.config.map_channels
        guided = unconditional[:, :c] + scale * (conditional[:, :c] - unconditional[:, :c])
        if self.config.guidance_rescale:
            ratio = conditional[:, :c].std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
            guided = guided * (1 + self.config.guidance_rescale * (ratio - 1))
        return torch.cat([guided, conditional[:, c:]], dim=1)

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents [B, c, h, w] to images [B, C, H, W] in [0, 1]; a model of pixels has no decoder."""
        if self.vae is not None:
            shift, scale = self.latents_scaling()
            z = self.vae.decode((z / scale + shift).to(self.vae.dtype)).sample
        return (z / 2 + 0.5).clamp(0, 1)

    def encode(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] to the mode of their scaled latents [B, c, h, w], float32."""
        if self.vae is None:
            return x
        encoded = self.vae.encode(x.to(self.vae.dtype))
        raw = encoded.latents if isinstance(self.vae, VQModel) else encoded.latent_dist.mode()
        shift, scale = self.latents_scaling()
        return (raw.float() - shift) * scale

    def latents_scaling(self) -> tuple[Tensor, ...]:
        """Shift and scale, each [1, c, 1, 1] float32."""
        return tuple(
            torch.tensor(values, dtype=torch.float32, device=self._execution_device).view(1, -1, 1, 1)
            for values in (self.config.latents_shift, self.config.latents_scale)
        )

    def read_inputs(self, image: ImageInput | None, mask_image: ImageInput | None, number: int) -> tuple[Tensor, ...]:
        """The conditioning images of `number` samples, uint8 [1 or number, C, H, W], and a mask as bool; ValueError."""
        type, channels = self.config.map_kind, self.config.map_channels
        if type == "none":
            if image is not None or mask_image is not None:
                raise ValueError("this model has no concat conditioning; image and mask_image must be None")
            return ()
        if image is None or (mask_image is None) == (type == "inpainting"):
            raise ValueError(INPUTS[type])
        if type == "inpainting":
            colours = self.unet.config.in_channels - channels if self.vae is None else self.vae.config.in_channels
            mask = self.read_images("mask_image", mask_image, 1, number) >= 128
            return self.read_images("image", image, colours, number), mask
        images = self.read_images("image", image, 0 if type == "segments" else channels, number)
        if type == "segments" and images.max() >= channels:
            raise ValueError(f"image has a pixel of class {images.max()}; the model has classes 0 to {channels - 1}")
        return (images,)

    def read_images(self, name: str, images: ImageInput, channels: int, number: int) -> Tensor:
        """One image or `number` of them, with 1 or 3 channels, or 0 for segmentation maps: uint8 [B, C, H, W]."""
        several = isinstance(images, list | tuple) or np.ndim(images) == 4
        arrays = [as_array(image, channels) for image in (images if several else [images])]
        if len(arrays) not in (1, number):
            raise ValueError(f"{name} has {len(arrays)} images; it must have one for all or one for each of {number}")
        shape = (*self.config.map_size, channels or 1)
        for array in arrays:
            if array.shape != shape or array.dtype != np.uint8:
                raise ValueError(f"{name} is {array.dtype}{list(array.shape)}; it must be uint8{list(shape)}")
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(self._execution_device)

    def encode_concat(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The concat conditioning of the images of `read_inputs`: [B, map_channels, h, w] float32."""
        type, side = self.config.map_kind, self.unet.config.sample_size
        if type == "none":
            return torch.zeros(1, 0, side, side, device=self._execution_device)
        if type == "inpainting":
            image, mask = inputs
            step = mask.shape[-1] // side
            z = self.encode((image / 127.5 - 1) * ~mask)
            small = mask[:, :, ::step, ::step].float()
            return torch.cat([part.expand(max(len(small), len(z)), -1, -1, -1) for part in (small, z)], dim=1)
        resize = partial(torch.nn.functional.interpolate, size=(side, side), antialias=True)
        # With antialiasing torch's filters are those of jax.image.resize; its other bicubic has another coefficient.
        if type == "low_resolution":
            return resize(inputs[0] / 127.5 - 1, mode="bicubic")
        one_hot = torch.nn.functional.one_hot(inputs[0][:, 0].long(), self.config.map_channels)
        return resize(one_hot.permute(0, 3, 1, 2).float(), mode="bilinear")

    def _or_config(self, name: str, value: float | None) -> float:
        return self.config[name] if value is None else value


def as_array(image: Image.Image | np.ndarray, channels: int) -> np.ndarray:
    """An image [H, W, C] with 1 (grey) or 3 channels (RGB) on white; with 0 the classes of a segmentation map."""
    if isinstance(image, Image.Image):
        if channels:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image).convert("L" if channels == 1 else "RGB")
        elif image.mode not in ("L", "P", "1"):
            raise ValueError(f"a segmentation map must be grey or have a palette, not {image.mode}")
        image = np.array(image, np.uint8)
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    return array * np.uint8(255 if channels else 1) if array.dtype == bool else array
