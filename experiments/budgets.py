"""The budgets of the experiments: what each changes in the config of the main job, and its number of processes."""

# A test of seconds; minutes on two cores; hours on two cores, with the main job itself; minutes on a large GPU.
BUDGETS = ("smoke", "minutes", "cpu", "gpu")
WITHOUT_HOURS = ("smoke", "minutes", "gpu")
# Processes; on two cores, two of one thread have the higher throughput.
WORKERS = {"smoke": 1, "minutes": 2, "cpu": 2, "gpu": 4}

# Every run of an experiment is trained without sampling or evaluation at its end: the experiment does both.
TRAINED_ONLY = {"sampling.num": 0, "sampling.progress_every": 0, "evaluation.vlb_examples": 0}
# The main job as it was when the experiments were run in minutes: without LPIPS and autoguidance, by AdamW, gamma 5.
BY_ADAMW = {
    "autoencoder.optimizer": "adamw",
    "autoencoder.learning_rate": 1.5e-3,
    "autoencoder.loss.kl": 1e-6,
    "autoencoder.loss.perceptual": 0.0,
    "autoencoder.loss.perceptual_start": 0,
    "diffusion.optimizer": "adamw",
    "diffusion.learning_rate": 1e-3,
    "diffusion.snr_gamma": 5.0,
    "sampling.guidance": 1.75,
    "sampling.guide_step": 0,
}
# Short trainings of the autoencoder, sufficient to compare diffusion models on its latents.
SHORT_AUTOENCODER = {"autoencoder.steps": 1_200, "autoencoder.loss.adversarial_start": 600}
LONGER_AUTOENCODER = {"autoencoder.steps": 2_000, "autoencoder.loss.adversarial_start": 1_000}
# For minutes on two cores: a UNet with two fifths of the main job's parameters, small batches, a third of the images.
SMALLER_UNET = {"unet.block_out_channels": (32, 64), "unet.norm_num_groups": 8}
MINUTES = SHORT_AUTOENCODER | SMALLER_UNET | {"diffusion.batch_size": 16, "data.train_split": "train[:20000]"}
# The smallest networks and fewest steps, for a test of the code.
SMOKE = {
    "data.train_split": "train[:512]",
    "data.test_split": "test[:100]",
    "autoencoder.block_out_channels": (8, 8, 8),
    "autoencoder.norm_num_groups": 4,
    "autoencoder.loss.adversarial": 0.0,
    "autoencoder.steps": 4,
    "unet.block_out_channels": (16,),
    "unet.attention": (False,),
    "unet.norm_num_groups": 8,
    "dit.hidden_size": 32,
    "dit.depth": 1,
    "diffusion.batch_size": 16,
    "diffusion.validation_examples": 64,
    "sampling.steps": 4,
}
# Batches large enough for a GPU; a single checkpoint at the end of so short a run.
LARGER_BATCHES = LONGER_AUTOENCODER | {"diffusion.batch_size": 128, "checkpoint_every": 2_000}
CHANGES = {  # of configs/fashion_mnist.py
    "smoke": BY_ADAMW | SMOKE,
    "minutes": BY_ADAMW | MINUTES,
    "cpu": {"keep_checkpoints": 20},
    "gpu": BY_ADAMW | LARGER_BATCHES,
}
MODEL_STEPS = {"smoke": 2, "minutes": 5_000, "gpu": 8_000}  # training steps of the model shared by solvers and guidance
