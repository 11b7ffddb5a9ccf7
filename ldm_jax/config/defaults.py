"""The default config: every field that a config can have, each with its meaning. Config files override some of them.

`--config.FIELD=VALUE` sets a field on the command line; `--print_config` prints the result. What a config without a
field means that was added here since version 0.2 is in `added`. A config file may leave a field open
(`placeholder(int)`, null): it then follows from the training images, see `ldm_jax/data/from_images.py`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The default config, locked, so that an unknown field is an error."""
    config = ConfigDict()
    config.seed = 0  # of all random numbers, which are indexed by (stage, step, example)
    # The models to train, in this order: autoencoder | clip (text and image encoder; with diffusion: text-to-image) |
    # diffusion | classifier (of noisy latents, for classifier guidance).
    config.stages = ("autoencoder", "diffusion")
    # Fine-tuning: a diffusers folder, hub id, single file or run folder. Its networks, noise schedule and prediction
    # type replace those below; only data, lora, textual_inversion, sampling and the training fields of diffusion are
    # used.
    config.init_from = ""
    config.dtype = "float32"  # of the networks' activations: float32 | bfloat16; parameters are float32
    config.log_every = 50  # steps between log lines
    config.checkpoint_every = 1_000  # steps between checkpoints
    config.keep_checkpoints = 2
    config.wandb = ""  # the Weights & Biases project, PROJECT or ENTITY/PROJECT, that metrics are logged to; "" = none
    config.denoiser = "unet"  # unet | dit (a diffusion transformer, Peebles 2023): the section with its sizes
    networks = (_data, _autoencoder, _clip, _diffusion, _mean_flow, _consistency, _concat, _unet, _dit, _classifier)
    for section in (*networks, _lora, _textual_inversion, _parallel, _sampling, _evaluation):
        section(config)
    return config.lock()


def _data(config: ConfigDict) -> None:
    """The data set and its splits."""
    data = config.data = ConfigDict()
    # fashion_mnist | emoji (with captions; splits train, validation) | images (those in data.path, in folders of
    # classes or not; splits train, test) | folder (images with captions in data.path) | concept (images in data.path,
    # with captions or not, for textual inversion) | any TFDS data set prepared as ArrayRecord in data.dir.
    data.name = "fashion_mnist"
    data.path = ""  # the source files of images, folder, concept, fashion_mnist or emoji
    data.dir = "data"  # the folder of the prepared data sets
    data.train_split = "train"
    data.test_split = "test"  # for the validation loss and the evaluation
    data.image_key = "auto"  # the image feature; auto = the only one
    data.label_key = "auto"  # the class label feature; auto = the only one, if any; none = no labels
    data.caption_key = "none"  # the caption feature (one or several texts each); auto = the only one; none
    data.segments_key = "none"  # the segmentation map feature, an image of class indices; none
    # Balanced sampling: the feature (a text or a number) that groups the images. In each epoch a group yields one
    # example, its images taking turns; none = each image is one example.
    data.group_key = "none"
    data.image_size = 28  # pixels; images are cropped to a square and resized
    data.crop = "center"  # center (the largest square) | none (the whole image, aspect ratio not kept)
    # init_from only: aspect ratio bucketing. Images are resized to about image_size^2 pixels, with sides that are
    # multiples of this many pixels; each batch has one shape. 0 = square images.
    data.bucket_step = 0
    data.channels = 1  # 1 (grayscale) | 3 (RGB)
    data.flip = False  # random horizontal flips
    data.memory_limit_gb = 4.0  # data sets larger than this (as uint8) are streamed from disk, not kept on the device


def _autoencoder(config: ConfigDict) -> None:
    """The first stage."""
    autoencoder = config.autoencoder = ConfigDict()
    autoencoder.type = "kl"  # kl | vq | none (diffusion on pixels)
    autoencoder.checkpoint = ""  # a run folder whose autoencoder is reused; "" = train one
    autoencoder.latent_channels = 4
    autoencoder.block_out_channels = (32, 64, 64)  # one per resolution; each but the last is followed by downsampling
    autoencoder.layers_per_block = 1
    autoencoder.norm_num_groups = 16
    autoencoder.mid_block_attention = True
    autoencoder.codebook_size = 512  # vq only
    loss = autoencoder.loss = ConfigDict()
    loss.reconstruction = 1.0  # weight of mean |x - x_hat|
    loss.perceptual = 1.0  # weight of LPIPS
    loss.perceptual_net = "vgg16"  # vgg16 | alexnet (for images of 64 pixels or more: see perceptual_size)
    loss.perceptual_size = 0  # pixels that images are resized to for LPIPS; 0 = not resized
    loss.perceptual_start = 0  # the first step with LPIPS
    loss.perceptual_every = 1  # compute LPIPS on every k-th example: it costs more than the autoencoder
    loss.kl = 1e-6  # weight of the KL, summed over the latent, per pixel value (Rombach 2022)
    loss.codebook = 1.0  # vq only: weight of |sg(h) - e|^2
    loss.commitment = 0.25  # vq only: weight of |h - sg(e)|^2
    loss.adversarial = 0.5  # weight of the patch discriminator, multiplied by the adaptive weight
    loss.adversarial_start = 50_001  # the first step with the adversarial loss
    discriminator = autoencoder.discriminator = ConfigDict()
    discriminator.channels = 64
    discriminator.layers = 3  # number of strided convolutions
    discriminator.learning_rate = 2e-4  # decays over autoencoder.steps, counted from adversarial_start: it ends above 0
    _training(autoencoder, steps=100_000, batch_size=128, learning_rate=4e-4)


def _clip(config: ConfigDict) -> None:
    """CLIP (Radford 2021); its text encoder conditions the UNet."""
    clip = config.clip = ConfigDict()
    clip.checkpoint = ""  # a run folder whose CLIP is reused; "" = train one
    clip.tokenizer = ""  # a folder with CLIP's vocabulary; "" = train a BPE tokenizer on the training captions
    clip.vocab_size = 2_048  # of the trained tokenizer, at most
    clip.max_length = 32  # context length in tokens, begin and end tokens included; 77 in CLIP
    clip.projection_dim = 64  # of the joint embedding space
    clip.text_width = 128  # must equal unet.context_dim for text-to-image
    clip.text_layers = 2
    clip.text_heads = 4
    clip.patch_size = 4  # pixels; must divide data.image_size
    clip.image_width = 128
    clip.image_layers = 3
    clip.image_heads = 4
    clip.max_shift = 0  # augmentation: random translation by up to this many pixels
    clip.max_zoom = 0.0  # augmentation: random scaling by a factor of up to 1 +- this
    clip.validation_examples = 2_000  # test images for the validation loss
    _training(clip, steps=10_000, batch_size=128, learning_rate=1e-3)


def _diffusion(config: ConfigDict) -> None:
    """The diffusion model: noise schedule, prediction type, loss."""
    diffusion = config.diffusion = ConfigDict()
    # diffusion | mean_flow (samples in one network call) | consistency (init_from only: distillation to a few steps)
    diffusion.objective = "diffusion"
    diffusion.timesteps = 1000  # T
    diffusion.schedule = "linear"  # linear | scaled_linear | cosine | rectified_flow
    diffusion.beta_start = 1e-4  # linear and scaled_linear only
    diffusion.beta_end = 0.02
    diffusion.zero_terminal_snr = False  # rescale the schedule so that z_T is pure noise (Lin 2023); not with eps
    diffusion.prediction = "eps"  # eps | v | z0 | flow | edm
    diffusion.weighting = "uniform"  # uniform | min_snr (Hang 2023)
    diffusion.snr_gamma = 5.0  # min_snr only
    diffusion.timestep_sampling = "uniform"  # uniform | logit_normal (Esser 2024)
    diffusion.timestep_mean = 0.0  # logit_normal only: of the logit of t / T, higher is more noise
    diffusion.timestep_std = 1.0
    diffusion.timestep_shift = 1.0  # above 1: more noise, for large images (Esser 2024, eq. 23)
    diffusion.variance = "fixed"  # of the reverse steps: fixed | learned (predicted by the UNet, Nichol 2021)
    diffusion.vlb_weight = 0.001  # learned variance only: lambda, the weight of the VLB in bits/dim
    diffusion.label_dropout = 0.1  # probability of dropping the condition, for classifier-free guidance
    diffusion.train_text_encoder = False  # text-conditional models: train the text encoders too
    diffusion.validation_examples = 2_000  # test images for the validation loss
    # Post-hoc EMA (Karras 2024): the lengths sigma_rel of power function averages that are kept next to the EMA, e.g.
    # (0.05, 0.1), of which --ema_sigma_rel of the commands makes one of any length; () = none.
    diffusion.ema_sigma_rels = ()
    diffusion.ema_snapshot_every = 1_000  # steps between the snapshots of these averages, all of which are kept
    _training(diffusion, steps=400_000, batch_size=128, learning_rate=1e-4)


def _mean_flow(config: ConfigDict) -> None:
    """diffusion.objective mean_flow only (Geng 2025); times are sampled as by diffusion.timestep_sampling."""
    mean_flow = config.mean_flow = ConfigDict()
    mean_flow.interval_ratio = 0.25  # of the examples that have an interval r < t; the others are of flow matching
    mean_flow.guidance = 1.0  # the guidance scale of the model itself, which then needs none at sampling; 1 = none
    mean_flow.kappa = 0.0  # the part of the guided velocity that is the network's, below 1
    mean_flow.tangent = "sample"  # of du/dt: sample (its velocity) | network (the marginal velocity, Geng 2025b)
    mean_flow.adaptive_power = 1.0  # the squared error is divided by its own power; 0 = no weight


def _consistency(config: ConfigDict) -> None:
    """diffusion.objective consistency only: latent consistency distillation (Luo 2023) of the model of init_from."""
    consistency = config.consistency = ConfigDict()
    # The guidance scale of the teacher, uniform between these; the distilled model needs none at sampling.
    consistency.guidance_min = 6.0
    consistency.guidance_max = 16.0
    consistency.huber_c = 1e-3  # c of the pseudo-Huber loss


def _concat(config: ConfigDict) -> None:
    """Conditioning by concatenation to the latents."""
    concat = config.concat = ConfigDict()
    concat.type = "none"  # none | low_resolution (super-resolution) | inpainting | segments (semantic synthesis)
    concat.factor = 4  # low_resolution only: the upscaling factor
    concat.num_segments = 2  # segments only: number of classes of the segmentation maps


def _unet(config: ConfigDict) -> None:
    """The UNet, with denoiser unet."""
    unet = config.unet = ConfigDict()
    unet.block_out_channels = (64, 128)
    unet.attention = (True, True)  # per resolution: transformer blocks? Their cross-attention is the conditioning
    unet.layers_per_block = 2
    unet.attention_heads = 4
    unet.transformer_layers = 1
    unet.norm_num_groups = 32
    unet.context_dim = 128  # width of the conditioning tokens tau(y)
    unet.context_tokens = 1  # learned tokens per class


def _dit(config: ConfigDict) -> None:
    """The diffusion transformer, with denoiser dit; DiT-XL/2 is patch_size 2, hidden_size 1152, depth 28, heads 16."""
    dit = config.dit = ConfigDict()
    dit.patch_size = 1  # latents a side of a patch; must divide the size of the latents
    dit.hidden_size = 128
    dit.depth = 6  # number of blocks
    dit.heads = 4  # must divide hidden_size
    dit.mlp_ratio = 4.0  # width of the feed-forward networks over hidden_size
    dit.norm = "layer"  # layer | rms
    dit.qk_norm = "none"  # of queries and keys: none | rms


def _classifier(config: ConfigDict) -> None:
    """A classifier of noisy latents, with the noise schedule of diffusion."""
    classifier = config.classifier = ConfigDict()
    classifier.block_out_channels = (64, 128)
    classifier.attention = (False, True)  # per resolution: with self-attention?
    classifier.layers_per_block = 1
    classifier.attention_heads = 4
    classifier.norm_num_groups = 16
    _training(classifier, steps=100_000, batch_size=128, learning_rate=3e-4)


def _lora(config: ConfigDict) -> None:
    """init_from only: LoRA of the UNet's attention (Hu 2021)."""
    lora = config.lora = ConfigDict()
    lora.rank = 0  # 0 = no LoRA: the whole UNet is trained
    lora.alpha = 8.0  # the update B A is multiplied by alpha / rank


def _textual_inversion(config: ConfigDict) -> None:
    """init_from only: textual inversion (Gal 2022), the training of a new token's vectors and of nothing else."""
    inversion = config.textual_inversion = ConfigDict()
    inversion.token = ""  # the new token of the text encoders, e.g. "<my-thing>"; "" = no textual inversion
    inversion.init_word = "object"  # the word, one token of the vocabulary, whose vector is the initial one
    inversion.vectors = 1  # of the token, in each text encoder
    # object | style: the prompts of images without captions, e.g. "a photo of a <my-thing>"; of images with captions,
    # these must contain the token.
    inversion.learnable_property = "object"


def _parallel(config: ConfigDict) -> None:
    """The distribution of training steps over the devices; a resumed run may change it (see docs/scaling.md)."""
    parallel = config.parallel = ConfigDict()
    # pmap (every device has the whole state) | fsdp (jit over a mesh: parameters, EMA and optimizer state are sharded)
    parallel.engine = "pmap"
    parallel.fsdp = 0  # fsdp only: number of devices that the state is sharded over, which divides all; 0 = all
    # Gradient accumulation: each batch is computed in so many micro-batches, with the same losses and gradients.
    parallel.accumulate = 1
    parallel.remat = False  # gradient checkpointing: recompute the activations of each block of the denoiser


def _sampling(config: ConfigDict) -> None:
    """The sampler, during training and at the end of a run."""
    sampling = config.sampling = ConfigDict()
    sampling.num = 10_000  # samples at the end of the run, the same number of each class
    # See diffusion/solvers.py: ddpm | ddim | plms | euler | euler_a | heun | lms | kdpm2 | kdpm2_a | edm | dpmpp_2m |
    # dpmpp_2m_sde | dpmpp_3m | dpmpp_2s | deis | unipc | lcm | tcd; own (init_from only) = the scheduler of the
    # pretrained model.
    sampling.sampler = "ddim"
    sampling.steps = 50
    # Of the timesteps: leading | trailing | linspace | karras | exponential | beta | flow (rectified_flow only).
    sampling.spacing = "trailing"
    sampling.eta = 0.0  # ddim: 0 deterministic, 1 ancestral; tcd: gamma
    sampling.variance = "fixed_small"  # ddpm only: fixed_small (beta_tilde) | fixed_large (beta) | learned
    sampling.churn = 0.0  # edm only: S_churn (Karras 2022); 0 = deterministic, heun (in sigma / alpha)
    sampling.guidance = 1.5  # classifier-free guidance scale; 1 = no guidance
    sampling.guidance_interval = (0.0, 1.0)  # the range of t / T with guidance
    # Autoguidance (Karras 2024) by this run's checkpoint of so many steps, which is kept, with the null condition, in
    # place of classifier-free guidance. 0 = none; no effect in a training that is not longer.
    sampling.guide_step = 0
    sampling.guidance_rescale = 0.0  # guidance rescale phi (Lin 2023); 0 = none, 1 = full
    sampling.threshold = 0.0  # pixel space only: quantile of dynamic thresholding (Saharia 2022); 0 = clip to [-1, 1]
    # Text-to-image: prompts of the samples, repeated in turn; () = the first captions of the split that differ, or
    # with concat conditioning the caption of each image.
    sampling.prompts = ()
    sampling.batch_size = 512
    sampling.progress_every = 2_000  # steps between validations and sample grids during training; 0 = none


def _evaluation(config: ConfigDict) -> None:
    """The scores at the end of a run."""
    evaluation = config.evaluation = ConfigDict()
    evaluation.num_reference = 10_000  # test images that the samples are compared with; at most all of the split
    evaluation.vlb_examples = 1_000  # test images for the VLB in bits/dim; 0 = not computed
    evaluation.zero_shot_key = "none"  # clip only: the label feature of zero-shot classification; none
    evaluation.resize = 32  # pixels that images are resized to for VGG16
    evaluation.batch_size = 256
    evaluation.inception_weights = ""  # FID Inception's weights (.pth or .safetensors); "" = FID is not computed


def _training(stage: ConfigDict, *, steps: int, batch_size: int, learning_rate: float) -> None:
    stage.steps = steps
    stage.batch_size = batch_size  # total, over all devices
    stage.learning_rate = learning_rate
    stage.optimizer = "adamw"  # adamw | muon (kernels of hidden layers by Muon, all else by AdamW)
    stage.warmup_steps = 200  # linear from 0
    stage.decay = "cosine"  # constant | cosine (to 0 at the last step)
    stage.adam_b2 = 0.99  # below 1
    stage.weight_decay = 0.0
    stage.clip_norm = 1.0  # of the global gradient norm, above 0
    stage.ema_decay = 0.999  # at step n: min(ema_decay, (1 + n) / (10 + n))
