"""What is particular to fine-tuning models with more or other conditions than texts: step by step, without training."""

from dataclasses import replace

import diffusers_folder
import jax
import ldm_files
import numpy as np
import pytest

from configs import finetune as finetune_config
from ldm_jax.data.datasets import Dataset
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.errors import InputError
from ldm_jax.models.concat_conditioning import NoiseAugmentation
from ldm_jax.pipeline.fine_tuning import check_data, prepare_base
from ldm_jax.pipeline.from_diffusers import UPSCALER_SCALE
from ldm_jax.pipeline.from_run import of_classes
from ldm_jax.pipeline.load import load, load_base
from ldm_jax.pipeline.trainable import LoRA, Parts, merge_trained, trainable_of, trained_shapes
from ldm_jax.sampling.recipe_of_run import recipe_of_run
from ldm_jax.training.from_config import make_diffusion_stage
from ldm_jax.training.text_embeddings import freeze


def config_of(path, rank=0):
    config = finetune_config.get_config().unlock()
    config.init_from, config.data.image_size, config.lora.rank = str(path), 16, rank
    return config.lock()


def examples(*labels, class_names, name="shapes"):
    """A set of grey images."""
    arrays = {"x": np.zeros((len(labels), 16, 16, 3), np.uint8), "label": np.int32(labels)}
    return Dataset(name, "test", arrays["x"].shape, class_names, (), (), "", arrays, None)


@pytest.fixture(scope="module")
def class_model(tmp_path_factory):
    """class_model(rank) -> a class-conditional LDM as it is to be fine-tuned, its parameters, and the config."""
    file = ldm_files.write_file(tmp_path_factory.mktemp("classes") / "model", "class-conditional LDM")
    loaded, params = load(file)

    def make(rank=0):
        model, config = prepare_base(config_of(file, rank), loaded, "")
        return model, params, config

    return make


def encode(model, params, rows):
    """The context of rows of the conditioning's table."""
    return model.conditioning.encode(params["conditioning"], np.asarray(rows))["context"]


def test_the_class_embedding_is_trained_with_the_denoiser(class_model, tmp_path):
    model, params, config = class_model()
    trainable = trainable_of(config, model)
    assert trainable == Parts(("denoiser", "conditioning"))
    trained = trainable.init(jax.random.key(0), params)
    table = np.asarray(params["conditioning"]["embedding"]["embedding"])
    assert sorted(trained) == ["conditioning", "denoiser"] and model.conditioning.num_classes == ldm_files.CLASSES
    shifted = trained | {"conditioning": jax.tree.map(lambda p: p + 1, trained["conditioning"])}
    merged = trainable.merge(params, shifted)
    np.testing.assert_allclose(encode(model, merged, [1, 5])[:, 0], table[[1, 5]] + 1, rtol=1e-6)
    after = merge_trained(trainable, params, shifted)
    np.testing.assert_array_equal(after["conditioning"]["embedding"]["embedding"], table + 1)
    _, frozen = freeze(model, params, trainable, (), config, tmp_path)
    assert sorted(frozen) == ["first_stage", "scale", "shift", "table"]
    assert frozen["table"].tolist() == list(range(ldm_files.CLASSES + 1))  # the last is the null condition
    state, _ = stepped(model, params, config, {"moments": np.zeros((2, 1, 8, 8, 3), np.float32)}, tmp_path)
    assert sorted(state.params) == ["conditioning", "denoiser"]


def test_with_lora_the_class_embedding_is_frozen(class_model, tmp_path):
    model, params, config = class_model(rank=2)
    trainable = trainable_of(config, model)
    assert trainable == LoRA(2, config.lora.alpha)
    trained = trainable.init(jax.random.key(0), params)
    assert sorted(trained) == ["lora"]
    _, frozen = freeze(model, params, trainable, (), config, tmp_path)
    table = np.asarray(params["conditioning"]["embedding"]["embedding"])
    np.testing.assert_array_equal(encode(model, trainable.merge(frozen, trained), [2])[:, 0], table[[2]])
    after = merge_trained(trainable, params, trained)
    assert after["conditioning"] is params["conditioning"]
    assert after["first_stage"] is params["first_stage"] and after["denoiser"] is not params["denoiser"]


@pytest.mark.parametrize("trainable", [Parts(("denoiser",)), LoRA(1, 4.0)])
def test_trained_parameters_take_the_types_of_the_model_s(trainable):
    """Training is in float32, whatever the type that a model is read in."""
    layer = {"to_q": {"kernel": np.ones((2, 3), np.float16)}}
    params = {"denoiser": layer, "first_stage": {"kernel": np.ones(2, np.float16)}}
    trained = jax.tree.map(lambda shape: np.full(shape.shape, 0.5, shape.dtype), trained_shapes(trainable, params))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(trained))
    after = merge_trained(trainable, params, trained)
    (kernel,) = jax.tree.leaves(after["denoiser"])
    assert isinstance(kernel, np.ndarray) and kernel.dtype == np.float16
    np.testing.assert_array_equal(kernel, np.full((2, 3), 0.5 if isinstance(trainable, Parts) else 2.0))  # 1 + 4 B A
    assert after["first_stage"] is params["first_stage"]


def test_data_of_more_classes_than_the_model_has(class_model):
    model, params, config = class_model()
    names = tuple("abcdef")
    check_data(config, model, params, examples(0, class_names=names[:5]))
    with pytest.raises(InputError, match="has 5 classes; shapes has 6, which must be no more"):
        check_data(config, model, params, examples(0, class_names=names))
    with pytest.raises(InputError, match="is conditioned on classes; shapes has none"):
        check_data(config, model, params, examples(0, class_names=()))


def test_the_classes_of_the_data_take_the_place_of_the_model_s_first(class_model):
    model, _, _ = class_model()
    origin = of_classes(model, ("a", "b")).origin
    assert (origin.class_names, origin.other_class_names) == (("a", "b"), ("2", "3", "4"))


def test_a_lora_where_there_is_no_attention(class_model):
    model, params, config = class_model(rank=2)
    flat = params | {"denoiser": {"conv_in": params["denoiser"]["conv_in"]}}
    with pytest.raises(InputError, match=r"lora.rank is 2; .* has no attention that LoRA could be of"):
        check_data(config, model, flat, examples(0, class_names=("a",)))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model of each variant."""
    home = tmp_path_factory.mktemp("finetune_any")
    for variant in ("inpainting", "upscaling"):
        diffusers_folder.write_stable_diffusion(home / variant, **{variant: True})
    diffusers_folder.write_unconditional(home / "unconditional")
    return home


def stepped(model, params, config, batch, cache):
    """The shapes of the state and the metrics after a step."""
    trainable = trainable_of(config, model)
    trained_model, frozen = freeze(model, params, trainable, [("low",), ("lower",), ("wool",)], config, cache)
    stage = make_diffusion_stage(trained_model, trainable, config)
    batch = batch | {"id": np.arange(2), "label": np.array([0, 2]), "step": 0}
    state = jax.eval_shape(stage.init, jax.random.key(0), params)
    return jax.eval_shape(stage.step, state, frozen, batch, np.uint32(0))


def test_an_upscaler(home, tmp_path):
    """Its first stage has a scale of its own; the low-resolution image has the size of the latents."""
    (model, params), config = load_base(config_of(home / "upscaling"))
    assert (config.concat.type, config.concat.factor) == ("low_resolution", 4)
    assert (params["scale"] == np.float32(UPSCALER_SCALE)).all()
    state, metrics = stepped(model, params, config, {"x": np.zeros((2, 16, 16, 3), np.uint8)}, tmp_path)
    assert sorted(state.params) == ["denoiser"] and metrics["loss"].shape == ()
    images = examples(0, 1, 0, class_names=("low", "wool"))
    recipe = recipe_of_run(of_classes(model, images.class_names), images)
    assert (recipe.labels, recipe.concat.noise_level, recipe.concat.split) == ([0, 1, 0], 20, "train")


def test_an_unconditional_model_takes_no_notice_of_labels(home, tmp_path):
    """Its latents are those before quantization, and have no variance."""
    (model, params), config = load_base(config_of(home / "unconditional"))
    assert (config.data.caption_key, config.data.label_key, config.sampling.guidance) == ("none", "none", 1.0)
    assert (config.autoencoder.type, config.concat.type) == ("vq", "none")
    state, _ = stepped(model, params, config, {"moments": np.zeros((2, 1, 8, 8, 4), np.float32)}, tmp_path)
    assert sorted(state.params) == ["denoiser"]
    recipe = recipe_of_run(of_classes(model, ()), examples(0, class_names=()))
    assert (recipe.num, recipe.prompts, recipe.labels, recipe.concat.split) == (16, [], [], None)


@pytest.mark.parametrize("variant", ["none", "inpainting"])
def test_the_prompts_of_a_text_to_image_model_without_prompts_of_its_own(variant, home):
    """The first eight captions that differ, in turn; or that of each image that is to be inpainted."""
    images = examples(3, 3, 1, 0, 3, 9, 2, 4, 5, 6, 7, 8, class_names=tuple("abcdefghij"))
    (model, _), config = load_base(config_of(home / "inpainting"))
    if variant == "none":
        model = replace(model, concat=None)
    recipe = recipe_of_run(model, images)
    labels = range(8) if variant == "none" else [0, 0, 1, 2, 0, 3, 4, 5, 6, 7, 8, 9]
    assert (recipe.labels, recipe.prompts) == (list(labels), list("dbajcefghi")[: max(labels) + 1])
    config = config.copy_and_resolve_references().unlock()
    config.sampling.prompts = ("low", "wool")
    recipe = recipe_of_run(replace(model, origin=model.origin._replace(config=config)), images)
    assert (recipe.labels, recipe.prompts) == ([0, 1], ["low", "wool"])


def test_low_resolution_images_are_noised_by_levels_of_their_own():
    process = make_process("linear", 1000, beta_start=1e-4, beta_end=0.02)
    small = np.full((400, 2, 2, 3), 0.5, np.float32)
    noised, arguments = NoiseAugmentation(process, 3).augment(small, jax.random.split(jax.random.key(0), 400))
    level = np.asarray(arguments["class_labels"])
    assert np.bincount(level).min() > 70 and level.max() == 3
    for k in range(4):
        noise = (np.asarray(noised)[level == k] - process.alpha[k] * 0.5) / process.sigma[k]
        assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
    assert np.unique(noised).size > 4000


@pytest.mark.parametrize(
    ("variant", "reason"),
    [("inpainting", "has concat conditioning"), ("xl", "is conditioned on the size of each image")],
)
def test_images_of_one_shape_alone(variant, reason, home, tmp_path):
    path = home / variant
    if variant == "xl":
        path = tmp_path / "xl"
        diffusers_folder.write_stable_diffusion(path, xl=True)
    config = config_of(path).copy_and_resolve_references().unlock()
    config.data.bucket_step = 4
    with pytest.raises(InputError, match=f"config.data.bucket_step is 4; it must be 0 .* {reason}"):
        load_base(config.lock())
