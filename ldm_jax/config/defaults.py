"""Every field of every config, once, with what it means. The other configs only override.

A field is changed on the command line by `--config.FIELD=VALUE`; `--print_config` shows the result.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The defaults: every field that exists, so that an unknown one is an error."""
    config = ConfigDict()
    config.seed = 0  # all randomness comes from here, indexed by (stage, step, example)
    # What is trained, in this order. clip: pictures and captions to one space, whose text encoder tells diffusion of
    # captions; classifier: one that guides sampling.
    config.stages = ("autoencoder", "diffusion")
    # A diffusers folder, or its name on the hub, that is fine-tuned: its networks, latents, noise schedule and kind of
    # prediction take the place of those below; only data, lora, sampling and how diffusion is trained are looked at.
    config.init_from = ""
    config.dtype = "float32"  # the networks' arithmetic: float32 | bfloat16; parameters and statistics stay float32

    data = config.data = ConfigDict()
    # A TFDS data set prepared as ArrayRecord, or one that is prepared when it is not there: fashion_mnist; emoji, with
    # captions, whose test_split is validation; or folder, your own pictures and captions in data.path.
    data.name = "fashion_mnist"
    data.path = ""  # where the files lie that folder (or fashion_mnist, emoji) is prepared from
    data.dir = "data"  # where prepared data sets lie
    data.train_split = "train"
    data.test_split = "test"  # for validation loss and scores
    data.image_key = "auto"  # the feature with the picture; auto = the only image
    data.label_key = "auto"  # the feature with the class; auto = the only class label, if any; none = do without
    data.caption_key = (
        "none"  # the feature with a text or several, which take the class's place; auto = the only one; none
    )
    data.segments_key = "none"  # the feature with a map of classes, an image whose pixels are their numbers; none
    # The feature, a text or a number, whose values are kinds: each kind has one turn in an epoch, for its pictures by
    # turns; none = each picture has one.
    data.group_key = "none"
    data.image_size = 28  # pixels; images are cropped to a square and resized
    data.crop = "center"  # center (the largest square) | none (all of it, squeezed)
    # init_from only: pictures keep about their own proportions, in shapes of image_size^2 pixels whose sides are
    # multiples of this, and a batch is of one shape; 0 = all are squares.
    data.bucket_step = 0
    data.channels = 1  # 1 grey | 3 colour
    data.flip = False  # random horizontal flips
    data.memory_limit_gb = 4.0  # larger sets (as uint8) are streamed from disk instead of living on the device

    autoencoder = config.autoencoder = ConfigDict()
    autoencoder.type = "kl"  # kl | vq | none (diffusion on pixels)
    autoencoder.checkpoint = ""  # a run folder whose autoencoder is used instead of training one
    autoencoder.latent_channels = 4
    autoencoder.block_out_channels = (32, 64, 64)  # one entry a resolution; each but the last halves it
    autoencoder.layers_per_block = 1
    autoencoder.norm_num_groups = 16
    autoencoder.mid_block_attention = True
    autoencoder.codebook_size = 512  # vq only
    loss = autoencoder.loss = ConfigDict()
    loss.reconstruction = 1.0  # weight of mean |x - x_hat|
    loss.perceptual = 1.0  # weight of LPIPS
    loss.perceptual_net = "vgg16"  # vgg16 | alexnet (wants 64 pixels or more: see perceptual_size)
    loss.perceptual_size = 0  # pixels that images are resized to for LPIPS; 0 = as they are
    loss.perceptual_every = 1  # LPIPS is measured on every so-many-th example: it costs more than the autoencoder
    loss.kl = 1e-6  # weight of the KL, summed over latents per pixel (Rombach 2022's unit)
    loss.codebook = 1.0  # vq only: weight of |sg(h) - e|^2
    loss.commitment = 0.25  # vq only: weight of |h - sg(e)|^2
    loss.adversarial = 0.5  # weight of the patch discriminator, times the adaptive weight
    loss.adversarial_start = 50_001  # the first step with it
    discriminator = autoencoder.discriminator = ConfigDict()
    discriminator.channels = 64
    discriminator.layers = 3  # strided ones
    discriminator.learning_rate = 2e-4
    _training(autoencoder, steps=100_000, batch_size=128, learning_rate=4e-4)

    clip = config.clip = ConfigDict()  # a text and an image encoder (Radford 2021); the UNet's context is the former's
    clip.checkpoint = ""  # a run folder whose CLIP is used instead of training one
    clip.tokenizer = ""  # a folder with CLIP's vocabulary; "" = one is learned from the captions of the training split
    clip.vocab_size = 2_048  # of that one, at most
    clip.max_length = 32  # tokens of a caption, its begin and end among them; 77 in CLIP
    clip.projection_dim = 64  # of the space of both
    clip.text_width = 128  # must be unet.context_dim, if there is one to be told
    clip.text_layers = 2
    clip.text_heads = 4
    clip.patch_size = 4  # pixels; must divide data.image_size
    clip.image_width = 128
    clip.image_layers = 3
    clip.image_heads = 4
    clip.max_shift = 0  # pixels that pictures are moved by at random, at most
    clip.max_zoom = 0.0  # share that they are made larger or smaller by at random, at most
    clip.validation_examples = 2_000  # test images that the validation loss is measured on
    _training(clip, steps=10_000, batch_size=128, learning_rate=1e-3)

    diffusion = config.diffusion = ConfigDict()
    diffusion.timesteps = 1000  # T
    diffusion.schedule = "linear"  # linear | scaled_linear | cosine
    diffusion.beta_start = 1e-4  # linear and scaled_linear only
    diffusion.beta_end = 0.02
    diffusion.zero_terminal_snr = False  # rescale so that z_T is pure noise (Lin 2023); not with eps
    diffusion.prediction = "eps"  # eps | v | z0
    diffusion.weighting = "uniform"  # uniform | min_snr (Hang 2023)
    diffusion.snr_gamma = 5.0  # min_snr only
    diffusion.variance = "fixed"  # of the reverse steps: fixed | learned, which the UNet predicts too (Nichol 2021)
    diffusion.vlb_weight = 0.001  # learned only: lambda, the weight of the variational bound in bits/dim
    diffusion.label_dropout = 0.1  # share of examples trained without their label, for classifier-free guidance
    diffusion.train_text_encoder = False  # of models of texts: whether their text encoders learn along
    diffusion.validation_examples = 2_000  # test images that the validation loss is measured on
    _training(diffusion, steps=400_000, batch_size=128, learning_rate=1e-4)

    concat = config.concat = ConfigDict()  # a map laid beside the latents: what is known of the picture
    concat.type = "none"  # none | low_resolution (super-resolution) | inpainting | segments (semantic maps)
    concat.factor = 4  # low_resolution only: how many times smaller the given picture is
    concat.num_segments = 2  # segments only: how many classes the map tells apart

    unet = config.unet = ConfigDict()
    unet.block_out_channels = (64, 128)
    unet.attention = (True, True)  # a transformer at this resolution?
    unet.layers_per_block = 2
    unet.attention_heads = 4
    unet.transformer_layers = 1
    unet.norm_num_groups = 32
    unet.context_dim = 128  # width of the conditioning tokens tau(y)
    unet.context_tokens = 1  # learned tokens for each class

    classifier = config.classifier = ConfigDict()  # of noised latents; its schedule is that of diffusion
    classifier.block_out_channels = (64, 128)
    classifier.attention = (False, True)  # self-attention at this resolution?
    classifier.layers_per_block = 1
    classifier.attention_heads = 4
    classifier.norm_num_groups = 16
    _training(classifier, steps=100_000, batch_size=128, learning_rate=3e-4)

    lora = config.lora = ConfigDict()  # init_from only: small matrices beside the attention's (Hu 2021)
    lora.rank = 0  # of B A, which is all that is trained; 0 = none, all of the UNet is trained
    lora.alpha = 8.0  # B A is multiplied by alpha / rank

    sampling = config.sampling = ConfigDict()
    sampling.num = 10_000  # pictures at the end of the run, the same number of each class
    sampling.sampler = "ddim"  # see diffusion/solvers.py: ddpm | ddim | plms | euler | euler_a | heun | edm |
    # dpmpp_2m | dpmpp_2m_sde | dpmpp_2s | unipc | lcm; own (init_from only) = the model's, and what goes with it
    sampling.steps = 50
    sampling.spacing = "trailing"  # of the steps: leading | trailing | linspace | karras | exponential
    sampling.eta = 0.0  # ddim only: 0 deterministic, 1 ancestral
    sampling.variance = "fixed_small"  # ddpm only: fixed_small (beta_tilde) | fixed_large (beta) | learned
    sampling.churn = 0.0  # edm only: S_churn, the noise added on the way (Karras 2022); 0 = none, as heun
    sampling.guidance = 1.5  # classifier-free guidance scale; 1 = none
    sampling.guidance_interval = (0.0, 1.0)  # the share t / T of the timesteps that guidance acts on
    sampling.guidance_rescale = 0.0  # how far guidance may not change the contrast (Lin 2023): 0 freely, 1 not at all
    sampling.threshold = 0.0  # pixel space only: z0_hat is bounded by this quantile of it (Saharia 2022); 0 = by 1
    # init_from only: what is drawn while training and at the end, in turn; () = the first few captions of the test
    # split that differ, or of a model that is given pictures the caption of each.
    sampling.prompts = ()
    sampling.batch_size = 512
    sampling.progress_every = 2_000  # steps between the sample grids made while training; 0 = none

    evaluation = config.evaluation = ConfigDict()
    evaluation.num_reference = 10_000  # test images compared with; fewer if the split is smaller
    evaluation.vlb_examples = 1_000  # of them, for the variational bound in bits/dim; 0 = leave it out
    evaluation.zero_shot_key = "none"  # clip only: the class that it tells by its names alone (Radford 2021); none
    evaluation.resize = 32  # pixels that images are resized to for VGG16
    evaluation.batch_size = 256
    evaluation.inception_weights = (
        ""  # file with the FID Inception's weights (.pth or .safetensors); "" = no Inception FID
    )

    config.log_every = 50  # steps between metric lines
    config.checkpoint_every = 1_000  # steps between checkpoints
    config.keep_checkpoints = 2
    return config.lock()


def _training(stage: ConfigDict, *, steps: int, batch_size: int, learning_rate: float) -> None:
    stage.steps = steps
    stage.batch_size = batch_size  # over all devices
    stage.learning_rate = learning_rate
    stage.warmup_steps = 200  # linear from 0
    stage.decay = "cosine"  # constant | cosine (to 0 at the last step)
    stage.adam_b2 = 0.99
    stage.weight_decay = 0.0
    stage.clip_norm = 1.0  # of the whole gradient
    stage.ema_decay = 0.999  # at step n: min(ema_decay, (1 + n) / (10 + n))
