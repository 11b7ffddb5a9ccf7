"""Which sizes of images and networks must fit each other: widths, resolutions, heads, groups, patches."""

from ml_collections import ConfigDict

from ldm_jax.config.fields import LPIPS_MIN_SIZE, wrong_field
from ldm_jax.config.io import flatten


def validate_networks(config: ConfigDict) -> None:
    """Raises InputError if the images do not fit the networks of a run from scratch, or a network its own fields."""
    size = config.data.image_size
    if config.autoencoder.type != "none":
        channels = config.autoencoder.block_out_channels
        _check_widths(config, "autoencoder")
        factor = 2 ** (len(channels) - 1)
        if size % factor:
            raise wrong_field(config, "data.image_size", f"the autoencoder needs a multiple of {factor}")
        _check_divides(config, "autoencoder.norm_num_groups", channels)
        _validate_perceptual(config)
        size //= factor
    if config.denoiser == "dit":
        _validate_dit(config, size)
    else:
        _validate_network(config, "unet", size)
    if "classifier" in config.stages:
        _validate_network(config, "classifier", size)


def _validate_perceptual(config: ConfigDict) -> None:
    """The size of the images for LPIPS, if an autoencoder is trained with it."""
    loss, least = config.autoencoder.loss, LPIPS_MIN_SIZE[config.autoencoder.loss.perceptual_net]
    trained = "autoencoder" in config.stages and not config.autoencoder.checkpoint
    used = trained and loss.perceptual and loss.perceptual_start < config.autoencoder.steps
    if used and (loss.perceptual_size or config.data.image_size) < least:
        rule = f"it must be {least} or more for LPIPS by {loss.perceptual_net} on images of {config.data.image_size}"
        raise wrong_field(config, "autoencoder.loss.perceptual_size", f"{rule} pixels (0: they are not resized)")


def _validate_dit(config: ConfigDict, size: int) -> None:
    """The sizes of the diffusion transformer on latents of `size` pixels."""
    dit = config.dit
    if size % dit.patch_size:
        raise wrong_field(config, "dit.patch_size", f"it must divide the size of the latents, {size}")
    if dit.hidden_size % 4:
        raise wrong_field(config, "dit.hidden_size", "it must be a multiple of 4, for the sinusoids of two axes")
    if dit.hidden_size % dit.heads:
        raise wrong_field(config, "dit.heads", f"it must divide config.dit.hidden_size = {dit.hidden_size}")


def _validate_network(config: ConfigDict, name: str, size: int) -> None:
    """The resolutions of the network `name` (unet or classifier) on latents of `size` pixels."""
    network, channels = config[name], config[name].block_out_channels
    _check_widths(config, name)
    if len(network.attention) != len(channels):
        raise wrong_field(config, f"{name}.attention", f"it must be as long as block_out_channels {channels}")
    _check_divides(config, f"{name}.norm_num_groups", channels)
    if network.norm_num_groups in channels:
        rule = f"it must be less than each of {channels}: groups of one channel normalize the time embedding away"
        raise wrong_field(config, f"{name}.norm_num_groups", rule)
    _check_divides(config, f"{name}.attention_heads", channels)
    if size < 2 ** (len(channels) - 1):
        raise wrong_field(config, f"{name}.block_out_channels", f"latents of {size}x{size} cannot be halved so often")


def _check_widths(config: ConfigDict, network: str) -> None:
    widths = config[network].block_out_channels
    if not widths or not all(isinstance(width, int) and width > 0 for width in widths):
        raise wrong_field(
            config, f"{network}.block_out_channels", "it must be one positive integer for each resolution"
        )


def _check_divides(config: ConfigDict, name: str, channels: tuple) -> None:
    for width in channels:
        if width % flatten(config)[name]:
            raise wrong_field(config, name, f"it must divide {width} of block_out_channels {channels}")
