"""What is particular to fine-tuning models that are told of more or less than texts: step by step, without training."""

import diffusers_folder
import jax
import ldm_files
import numpy as np
import pytest

from configs import finetune as finetune_config
from ldm_jax.data.datasets import Dataset
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.errors import InputError
from ldm_jax.pipeline import base_model, from_diffusers, trainable
from ldm_jax.pipeline import model as pipeline_model
from ldm_jax.pipeline.trainable import NO_CAPTIONS
from ldm_jax.pipeline.upscaler import SCALE, Upscaling, make_augment
from ldm_jax.sampling import recipe
from ldm_jax.training import from_config as training_from_config
from ldm_jax.training import stages
from ldm_jax.training.text_embeddings import numbered


def config_of(path, rank=0):
    config = finetune_config.get_config().unlock()
    config.init_from, config.data.image_size, config.lora.rank = str(path), 16, rank
    return config.lock()


def examples(*labels, class_names, name="shapes"):
    """A set of grey pictures."""
    arrays = {"x": np.zeros((len(labels), 16, 16, 3), np.uint8), "label": np.int32(labels)}
    return Dataset(name, "test", arrays["x"].shape, class_names, (), (), "", arrays, None)


@pytest.fixture(scope="module")
def of_classes(tmp_path_factory):
    """of_classes(rank) -> a class-conditional LDM as it is to be fine-tuned, and the config."""
    file = ldm_files.write_file(tmp_path_factory.mktemp("classes") / "model", "class-conditional LDM")
    model, theirs, params = from_diffusers.load(file)

    def make(rank=0):
        config = config_of(file, rank).copy_and_resolve_references().unlock()
        config.autoencoder.update(theirs.autoencoder)
        return base_model.Base(model, params, ""), config.lock()

    return make


def test_the_embeddings_of_classes_learn_with_the_unet(of_classes, tmp_path):
    base, config = of_classes()
    network, label = trainable.build_network(config, base, NO_CAPTIONS), np.array([1, 5])
    params = network.init(jax.random.key(0))
    table = np.asarray(base.params["conditioner"]["embedding"]["embedding"])
    assert sorted(params) == ["conditioner", "unet"] and network.null == ldm_files.CLASSES
    shifted = params | {"conditioner": jax.tree.map(lambda p: p + 1, params["conditioner"])}
    np.testing.assert_allclose(network.tell(shifted, {}, label)["context"][:, 0], table[label] + 1, rtol=1e-6)
    after = trainable.with_trained(config, base, shifted)
    np.testing.assert_array_equal(after["conditioner"]["embedding"]["embedding"], table + 1)
    assert "conditioner" not in training_from_config.frozen_arrays(config, base, NO_CAPTIONS, tmp_path)
    state, _ = stepped(config, base, {"moments": np.zeros((2, 1, 8, 8, 3), np.float32)}, tmp_path)
    assert sorted(state.params) == ["conditioner", "unet"]


def test_beside_a_lora_the_embeddings_of_classes_stay(of_classes, tmp_path):
    base, config = of_classes(rank=2)
    network, frozen = (
        trainable.build_network(config, base, NO_CAPTIONS),
        training_from_config.frozen_arrays(config, base, NO_CAPTIONS, tmp_path),
    )
    params = network.init(jax.random.key(0))
    assert sorted(params) == ["lora"]
    table = np.asarray(base.params["conditioner"]["embedding"]["embedding"])
    np.testing.assert_array_equal(network.tell(params, frozen, np.array([2]))["context"][:, 0], table[[2]])
    after = trainable.with_trained(config, base, params)
    assert after["conditioner"] is base.params["conditioner"]


def test_data_of_other_classes_than_the_model_knows(of_classes):
    base, config = of_classes()
    names = tuple("abcdef")
    training_from_config.check_data(config, base, examples(0, class_names=names[:5]))
    with pytest.raises(InputError, match="knows 5 classes; shapes has 6, which must be no more"):
        training_from_config.check_data(config, base, examples(0, class_names=names))
    with pytest.raises(InputError, match="is a model of classes; shapes has none"):
        training_from_config.check_data(config, base, examples(0, class_names=()))


def test_a_lora_where_there_is_no_attention(of_classes):
    base, config = of_classes(rank=2)
    flat = base._replace(params=base.params | {"unet": {"conv_in": base.params["unet"]["conv_in"]}})
    with pytest.raises(InputError, match=r"lora.rank is 2; .* has no attention that LoRA could be of"):
        training_from_config.check_data(config, flat, examples(0, class_names=("a",)))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model of each kind."""
    home = tmp_path_factory.mktemp("finetune_any")
    for kind in ("inpainting", "upscaling"):
        diffusers_folder.write_stable_diffusion(home / kind, **{kind: True})
    diffusers_folder.write_unconditional(home / "unconditional")
    return home


def stepped(config, base, batch, cache):
    """The shapes of what a step makes of a batch."""
    captions = numbered([("low",), ("lower",), ("wool",)])
    stage, frozen = (
        training_from_config.build_stage(config, base, captions),
        training_from_config.frozen_arrays(config, base, captions, cache),
    )
    batch = batch | {"id": np.arange(2), "label": np.array([0, 2]), "step": 0}
    state = jax.eval_shape(stage.init, jax.random.key(0))
    return jax.eval_shape(stage.step, state, frozen, batch, np.uint32(0))


def test_an_upscaler(home, tmp_path):
    """Its first stage has a scale of its own; the small picture has the size of the latents."""
    base, config = base_model.load_base(config_of(home / "upscaling"))
    assert (config.concat.kind, config.concat.factor) == ("low_resolution", 4)
    assert (base.params["scale"] == np.float32(SCALE)).all()
    state, metrics = stepped(config, base, {"x": np.zeros((2, 16, 16, 3), np.uint8)}, tmp_path)
    assert sorted(state.params) == ["unet"] and metrics["loss"].shape == ()
    pictures = examples(0, 1, 0, class_names=("low", "wool"))
    found = recipe.of_config(stages.before_fine_tuning(config, base, pictures), pictures)
    assert (found.labels, found.noise_level, found.map_split) == ([0, 1, 0], 20, "train")


def test_an_unconditional_model_takes_no_notice_of_labels(home, tmp_path):
    """Its latents are those before the codes are looked up, and have no variance."""
    base, config = base_model.load_base(config_of(home / "unconditional"))
    assert (config.data.caption_key, config.data.label_key, config.sampling.guidance) == ("none", "none", 1.0)
    assert (config.autoencoder.kind, config.concat.kind) == ("vq", "none")
    state, _ = stepped(config, base, {"moments": np.zeros((2, 1, 8, 8, 4), np.float32)}, tmp_path)
    assert sorted(state.params) == ["unet"]
    found = recipe.of_config(stages.before_fine_tuning(config, base, examples(0, class_names=())), None)
    assert (found.num, found.prompts, found.labels, found.map_split) == (16, [], [], "")


@pytest.mark.parametrize("kind", ["none", "inpainting"])
def test_what_a_model_of_texts_draws_unless_it_is_told(kind, home):
    """The first eight captions that differ, in turn; or that of each picture that is to be filled in."""
    pictures = examples(3, 3, 1, 0, 3, 9, 2, 4, 5, 6, 7, 8, class_names=tuple("abcdefghij"))
    base, config = base_model.load_base(config_of(home / "inpainting"))
    config = config.copy_and_resolve_references().unlock()
    config.concat.kind = kind
    model = pipeline_model.Trained(config, (), base.params, 0, base.model)
    found = recipe.of_config(model, pictures)
    labels = range(8) if kind == "none" else [0, 0, 1, 2, 0, 3, 4, 5, 6, 7, 8, 9]
    assert (found.labels, found.prompts) == (list(labels), list("dbajcefghi")[: max(labels) + 1])
    config.sampling.prompts = ("low", "wool")
    found = recipe.of_config(model, pictures)
    assert (found.labels, found.prompts) == ([0, 1], ["low", "wool"])


def test_small_pictures_are_noised_by_levels_of_their_own():
    process = make_process("linear", 1000, beta_start=1e-4, beta_end=0.02)
    augment = make_augment(Upscaling(process, 3, {}))
    maps = np.full((400, 2, 2, 3), 0.5, np.float32)
    seen, told = augment(maps, jax.random.split(jax.random.key(0), 400))
    level = np.asarray(told["class_labels"])
    assert np.bincount(level).min() > 70 and level.max() == 3
    for k in range(4):
        noise = (np.asarray(seen)[level == k] - process.alpha[k] * 0.5) / process.sigma[k]
        assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
    assert np.unique(seen).size > 4000


@pytest.mark.parametrize(
    ("kind", "said"), [("inpainting", "sees a map beside its latents"), ("xl", "is told the size of each picture")]
)
def test_what_takes_pictures_of_one_shape_alone(kind, said, home, tmp_path):
    path = home / kind
    if kind == "xl":
        path = tmp_path / "xl"
        diffusers_folder.write_stable_diffusion(path, xl=True)
    config = config_of(path).copy_and_resolve_references().unlock()
    config.data.bucket_step = 4
    with pytest.raises(InputError, match=f"config.data.bucket_step is 4; it must be 0 .* {said}"):
        base_model.load_base(config.lock())
