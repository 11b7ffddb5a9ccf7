"""Runs to diffusers folders and back, diffusers folders to new ones: nothing is lost, and what cannot be is refused."""

import json
import shutil
import subprocess
import sys

import diffusers_folder
import jax
import jobs
import numpy as np
import pytest
import random_runs
import tiny

from ldm_jax import command_line, convert, evaluate, sample
from ldm_jax.errors import InputError
from ldm_jax.evaluation import scoring
from ldm_jax.export import run_folder
from ldm_jax.interop.weights import read_state_dict, write_safetensors
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import fingerprint
from ldm_jax.pipeline.scheduler import scheduler_of_run
from ldm_jax.run_folder.checkpoint import load_latest
from ldm_jax.runtime.files import content_hash

WEIGHTS = "diffusion_pytorch_model.safetensors"


def run(model, to, *flags):
    """The command; returns where it wrote."""
    assert command_line.run(convert.main, ["convert", f"--model={model}", f"--to={to}", *flags]) == 0
    return to


def arrays_of(folder):
    """The weights in a folder, read."""
    return {name: np.asarray(tensor) for name, tensor in read_state_dict(folder).items()}


def fails(flags, capsys, status=2):
    """The one line that the command prints as it fails."""
    capsys.readouterr()
    assert command_line.run(convert.main, ["convert", *flags]) == status
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory):
    """The trained run as a diffusers folder; to be read or copied."""
    return run(trained_run, tmp_path_factory.mktemp("exported") / "new" / "folder")


@pytest.fixture(scope="module")
def again(exported, tmp_path_factory):
    """And as a run folder again."""
    return run(exported, tmp_path_factory.mktemp("again") / "run")


def assert_same_parameters(one, other):
    """Of two run folders: all that there is in the second, to the bit, which is all that sampling needs."""
    stages = [stage for stage in ("autoencoder", "diffusion") if (one / stage).exists()]
    for stage in stages:
        before, after = load_latest(one / stage), load_latest(other / stage)
        kept = {name for name in before if name == "step" or name.startswith("ema_params/")}
        assert after.keys() == kept
        for name in after:
            np.testing.assert_array_equal(after[name], before[name], err_msg=name, strict=True)


def test_a_run_there_and_back_is_the_same_to_the_bit(trained_run, exported, again):
    assert_same_parameters(trained_run, again)
    assert fingerprint(*load(trained_run)) == fingerprint(*load(exported))  # to `--from_recipe` too
    assert load(trained_run)[0] == load(exported)[0]
    for name in ("config.json", "data.json", "autoencoder/scale.json"):
        assert (again / name).read_bytes() == (trained_run / name).read_bytes()


@pytest.mark.slow
def test_an_exported_run_is_scored_on_its_own_data(exported, monkeypatch, tmp_path):
    names = []
    monkeypatch.setattr(scoring, "score", lambda m, p, c, images, train, test, concat: names.append(test.name) or {})
    monkeypatch.setattr(scoring, "score_likelihood", lambda *_: {})
    command = ["evaluate", f"--model={exported}", f"--out={tmp_path / 'out'}", "--num=4", "--steps=2"]
    assert command_line.run(evaluate.main, command) == 0
    assert names == ["tiny"]
    assert command_line.run(evaluate.main, [*command, "--config=tests/tiny.py"]) == 2


def test_the_files_of_an_exported_run(trained_run, exported):
    files = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    assert files == {
        "model_index.json", "pipeline.py", "recipe.json", "README.md", "scheduler/scheduler_config.json",
        "unet/config.json", f"unet/{WEIGHTS}", "vae/config.json", f"vae/{WEIGHTS}",
    }  # fmt: skip
    assert len({path.stat().st_mode for path in exported.rglob("*") if path.is_file()}) == 1
    index = json.loads((exported / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "LatentDiffusionPipeline"]
    assert index["id2label"] == {str(k): name for k, name in enumerate(tiny.CLASS_NAMES)}
    assert [path.name for path in exported.parent.iterdir()] == ["folder"]  # nothing temporary stays


def test_the_model_card(trained_run, exported):
    card = (exported / "README.md").read_text()
    evaluation = json.loads((trained_run / "evaluation.json").read_text())
    for name, score in evaluation["samples"].items():
        assert f"| The samples | {name} | {score['value']:.4g} |" in card
    for words in ("horizontal, vertical, bright, dark", "64 images of tiny", "trust_remote_code=True", "# license:"):
        assert words in card


def test_an_exported_run_samples_as_the_run(trained_run, exported, tmp_path):
    """The samples that ended the run, and those of a class by its name."""
    command = ["sample", f"--model={exported}", "--num=8", "--batch_size=8", "--nosave_trajectory"]
    assert command_line.run(sample.main, [*command, f"--out={tmp_path / 'all'}"]) == 0
    expected, samples = jobs.samples(trained_run), jobs.samples(tmp_path / "all")
    np.testing.assert_array_equal(samples["images"], expected["images"])
    np.testing.assert_array_equal(samples["labels"], expected["labels"])
    assert command_line.run(sample.main, [*command, f"--out={tmp_path / 'one'}", "--label=dark"]) == 0
    assert jobs.samples(tmp_path / "one")["labels"].tolist() == [3] * 8


TWO_LEVELS = {"unet.block_out_channels": (8, 16), "unet.attention": (False, False)}
RUNS = {  # changes of tests/tiny.py, classes
    "codes, two tokens for each of two classes": ({"autoencoder.type": "vq", "unet.context_tokens": 2}, ("cat", "dog")),
    "pixels, a variance, no classes, no attention": (
        {"autoencoder.type": "none", "diffusion.variance": "learned", **TWO_LEVELS},
        (),
    ),
    "low resolution": ({"concat.type": "low_resolution", "concat.factor": 2}, tiny.CLASS_NAMES),
    "codes and inpainting": (
        {"concat.type": "inpainting", "autoencoder.type": "vq", **TWO_LEVELS},
        (),
    ),
    "pixels and segmentation": (
        {
            "concat.type": "segments",
            "concat.num_segments": 3,
            "data.segments_key": "areas",
            "autoencoder.type": "none",
            **TWO_LEVELS,
        },
        ("cat", "dog"),
    ),
}
CONCAT = {  # what model_index.json has of concat conditioning
    "low resolution": ("low_resolution", 1, [4, 4]),
    "codes and inpainting": ("inpainting", 3, [8, 8]),
    "pixels and segmentation": ("segments", 3, [8, 8]),
}
CARD = {  # what the card says about it
    "low resolution": ("image of 4x4 pixels", "pipe([0, 3], image=Image", "--label=0,3 --concat_image=small.png"),
    "codes and inpainting": ("a mask, white where", "num_images=4, image=Image.open", "--mask=mask.png"),
    "pixels and segmentation": ("8x8 pixels, grey or", "numbers of 3 classes", "--concat_image=segmentation.png"),
}


@pytest.mark.parametrize("kind", RUNS)
def test_other_runs_there_and_back(kind, tmp_path):
    made = random_runs.random_run(tmp_path / "run", *RUNS[kind])
    again = run(run(made, tmp_path / "folder"), tmp_path / "again")
    assert_same_parameters(made, again)
    for name in ("config.json", "data.json", *(() if "pixels" in kind else ("autoencoder/scale.json",))):
        assert (again / name).read_bytes() == (made / name).read_bytes()
    assert (tmp_path / "folder" / "vae").exists() == (again / "autoencoder").exists() == ("pixels" not in kind)
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    card, concat = (tmp_path / "folder" / "README.md").read_text(), CONCAT.get(kind)
    assert tuple(index.get(name) for name in ("map_kind", "map_channels", "map_size")) == (concat or (None,) * 3)
    assert all(words in card for words in CARD.get(kind, ())) and ("image=Image" in card) == bool(concat)
    (tmp_path / "folder" / "recipe.json").unlink()  # as of a fine-tuned model
    (model, params), (read, read_params) = load(made), load(tmp_path / "folder")
    assert (read.concat, read.image_shape, read.learned_variance) == (
        model.concat, model.image_shape, model.learned_variance)  # fmt: skip
    for name in params:
        jax.tree.map(np.testing.assert_array_equal, read_params[name], params[name])


CONCAT_DAMAGE = [
    {"map_kind": "depth"},
    {"map_channels": "1"},
    {"map_channels": 0},
    {"map_size": [3, 3]},
    {"map_size": 4},
]


@pytest.mark.parametrize("damage", CONCAT_DAMAGE, ids=str)
def test_concat_conditioning_that_no_model_has(damage, tmp_path):
    folder = run(random_runs.random_run(tmp_path / "run", *RUNS["low resolution"]), tmp_path / "folder")
    (folder / "recipe.json").unlink()
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | damage))
    with pytest.raises(InputError, match=r"model_index\.json is damaged: (map_kind|latents_shift)"):
        load(folder)


def test_a_run_in_bfloat16(trained_run, exported, tmp_path):
    folder = run(trained_run, tmp_path / "half", "--dtype=bfloat16")
    for name in ("unet", "vae"):
        exact, half = arrays_of(exported / name), arrays_of(folder / name)
        assert {array.dtype.name for array in half.values()} == {"bfloat16"}
        assert half.keys() == exact.keys()
        for key, array in half.items():
            np.testing.assert_allclose(array.astype(np.float32), exact[key], rtol=2**-8, err_msg=key)
    assert (folder / "recipe.json").read_bytes() == (exported / "recipe.json").read_bytes()


SCHEDULERS = {  # changes of tests/tiny.py -> diffusers' class, what the card must say
    "the solver that there is": ({"sampling.sampler": "unipc"}, "UniPCMultistepScheduler", None),
    "ddim with trailing steps": ({}, "EulerDiscreteScheduler", None),
    "ddim with leading steps": ({"sampling.spacing": "leading"}, "DDIMScheduler", None),
    "ddim with noise": ({"sampling.eta": 1.0}, "DDIMScheduler", "takes 20 // steps for each step"),
    "ddim down to pure noise": (
        {"diffusion.zero_terminal_snr": True, "diffusion.prediction": "v"}, "DDIMScheduler", "takes 20 // steps"),
    "churn": ({"sampling.sampler": "edm", "sampling.churn": 5.0}, "DDIMScheduler", "By DDIM with trailing steps"),
    "clipped pixels": (
        {"sampling.sampler": "unipc", "autoencoder.type": "none"}, "DDIMScheduler",
        "does not support clip_sample = True"),
    "thresholded pixels": (
        {"sampling.spacing": "leading", "autoencoder.type": "none", "sampling.threshold": 0.99},
        "DDIMScheduler", "Without dynamic thresholding"),
    "uneven steps of a class without": (
        {"sampling.sampler": "euler_a", "sampling.spacing": "karras"}, "DDIMScheduler", "use_karras_sigmas"),
}  # fmt: skip


@pytest.mark.parametrize("case", SCHEDULERS)
def test_the_scheduler_of_a_run(case):
    changes, expected, note = SCHEDULERS[case]
    config = tiny.get_config().unlock()
    config.update_from_flattened_dict(changes)
    fields, notes = scheduler_of_run(config)
    assert fields["_class_name"] == expected
    assert (note in " ".join(notes)) if note else notes == []
    assert fields["clip_sample"] == (config.autoencoder.type == "none")


FLOWS = {  # changes of tests/tiny.py on rectified flow -> what the card must say
    "ddim": ({}, ""),
    "euler between the timesteps": ({"sampling.sampler": "euler", "sampling.spacing": "flow"}, ""),
    "noise": ({"sampling.sampler": "ddpm"}, "By Euler's method without noise instead of by ddpm."),
    "eta": ({"sampling.eta": 0.5}, "By Euler's method without noise instead of by ddim."),
    "leading steps": ({"sampling.spacing": "leading"}, "With trailing steps instead of leading ones."),
    "both ends": ({"sampling.spacing": "linspace"}, "With flow steps instead of linspace ones."),
    "pixels": ({"autoencoder.type": "none"}, "Without clipping z0 to [-1, 1]."),
}


@pytest.mark.parametrize("case", FLOWS)
def test_the_scheduler_of_a_run_on_rectified_flow(case):
    changes, note = FLOWS[case]
    config = tiny.get_config().unlock()
    flow = {"diffusion.schedule": "rectified_flow", "diffusion.prediction": "flow"}
    config.update_from_flattened_dict(flow | changes)
    fields, notes = scheduler_of_run(config)
    assert fields["_class_name"] == "FlowMatchEulerDiscreteScheduler" and fields["num_train_timesteps"] == 20
    assert " ".join(notes) == note


@pytest.mark.parametrize("changes, problem", [
    ({"diffusion.prediction": "z0"}, "diffusers has no scheduler for config.diffusion.prediction = 'z0'"),
    ({"stages": ("autoencoder", "clip", "diffusion")}, "StableDiffusionPipeline, which samples text-to-image runs"),
    ({"denoiser": "dit"}, "DiTPipeline, which samples diffusion transformers, has no flow scheduler"),
])  # fmt: skip
def test_runs_on_rectified_flow_that_diffusers_has_no_class_for(changes, problem):
    config = tiny.get_config().unlock()
    flow = {"diffusion.schedule": "rectified_flow", "diffusion.prediction": "flow"}
    config.update_from_flattened_dict(flow | changes)
    with pytest.raises(InputError, match=problem):
        scheduler_of_run(config)


FOLDERS = {
    "plain": lambda folder: diffusers_folder.write_stable_diffusion(folder),
    "xl": lambda folder: diffusers_folder.write_stable_diffusion(folder, xl=True),
    "refiner": lambda folder: diffusers_folder.write_stable_diffusion(folder, refiner=True),
    "consistency model": lambda folder: diffusers_folder.write_stable_diffusion(folder, lcm=True),
    "upscaler": lambda folder: diffusers_folder.write_stable_diffusion(folder, upscaling=True),
    "unconditional": diffusers_folder.write_unconditional,
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_diffusers_folder_anew_is_the_same_to_the_bit(kind, tmp_path):
    old = FOLDERS[kind](tmp_path / "old")
    (old / "README.md").write_text("of theirs")
    new = run(old, tmp_path / "new")
    (before, params), (after, new_params) = load(old), load(new)
    assert before == after and before.defaults == after.defaults
    assert fingerprint(before, params) == fingerprint(after, new_params)
    assert (before.origin.schedulers, before.origin.pipeline) == (after.origin.schedulers, after.origin.pipeline)
    tokenizers = [getattr(model.conditioning, "tokenizers", ()) for model in (before, after)]
    for one, other in zip(*tokenizers, strict=True):
        np.testing.assert_array_equal(one(["low lower"]).ids, other(["low lower"]).ids)
    assert (new / "README.md").read_text() == "of theirs"
    index = json.loads((new / "model_index.json").read_text())
    components = {name: kind for name, kind in index.items() if isinstance(kind, list)}
    expected = {"unet": "UNet2DModel" if kind == "unconditional" else "UNet2DConditionModel"}
    assert components.items() >= {name: ["diffusers", value] for name, value in expected.items()}.items()
    if kind == "xl":
        assert components["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]
    if kind == "refiner":
        assert components["text_encoder"] == components["tokenizer"] == [None, None]
        assert index["requires_aesthetics_score"] is True and not (new / "text_encoder").exists()
    if kind == "plain":
        assert components["safety_checker"] == [None, None] and index["requires_safety_checker"] is False


def test_a_diffusers_folder_in_bfloat16_keeps_its_hints(tmp_path):
    """The flags that keep half precision from overflowing in diffusers."""
    old = FOLDERS["plain"](tmp_path / "old")
    for name, field in (("unet", "upcast_attention"), ("vae", "force_upcast")):
        config = json.loads((old / name / "config.json").read_text())
        (old / name / "config.json").write_text(json.dumps(config | {field: name == "unet"}))
    new = run(old, tmp_path / "new", "--dtype=bfloat16")
    configs = {name: json.loads((new / name / "config.json").read_text()) for name in ("unet", "vae", "text_encoder")}
    assert configs["unet"]["upcast_attention"] is True
    assert configs["vae"]["force_upcast"] is False
    assert configs["text_encoder"]["dtype"] == "bfloat16"
    assert {array.dtype.name for array in arrays_of(new / "text_encoder").values()} == {"bfloat16"}
    assert fingerprint(*load(old, "bfloat16")) == fingerprint(*load(new, "bfloat16"))


def test_weights_beyond_half_precision(tmp_path, capsys):
    """Of any component; nothing is written."""
    for component, name in (("unet", WEIGHTS), ("vae", WEIGHTS), ("text_encoder", "model.safetensors")):
        old = FOLDERS["plain"](tmp_path / component)
        state = {key: np.array(value) for key, value in arrays_of(old / component).items()}
        key = min(key for key, value in state.items() if value.dtype == np.float32)
        state[key].flat[0] = 1e6
        write_safetensors(old / component / name, state)
        line = fails([f"--model={old}", f"--to={tmp_path / 'new'}", "--dtype=float16"], capsys)
        assert f"in float16 {key} has values that are not finite" in line and not (tmp_path / "new").exists()
        run(old, tmp_path / f"{component}_bfloat16", "--dtype=bfloat16")


def test_old_names_become_todays(tmp_path):
    old = FOLDERS["unconditional"](tmp_path / "old")
    file = old / "unet" / WEIGHTS
    modern = arrays_of(old / "unet")
    renamed = {name.replace("to_out.0", "proj_attn").replace("to_q", "query"): array for name, array in modern.items()}
    assert renamed.keys() != modern.keys()
    write_safetensors(file, renamed)
    new = arrays_of(run(old, tmp_path / "new") / "unet")
    assert new.keys() == modern.keys()
    for name, array in modern.items():
        np.testing.assert_array_equal(new[name], array, err_msg=name)


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


FLAGS = {  # flags -> what the line must say
    "no model": (["--to=TO"], "--model is missing"),
    "nowhere to go": (["--model=RUN"], "--to is missing; it must be the new folder, or .safetensors"),
    "an empty model": (["--model=", "--to=TO"], "--model is missing"),
    "an unknown flag": (["--model=RUN", "--too=TO"], "did you mean to?"),
    "an unknown type": (["--model=RUN", "--to=TO", "--dtype=float8"], "--dtype"),
    "a stray word": (["--model=RUN", "--to=TO", "now"], "'now' is no flag"),
    "a model that is not there": (["--model=nowhere", "--to=TO"], "nowhere does not exist"),
    "a model that is a file": (["--model=README.md", "--to=TO"], "is a file"),
    "no model at all": (["--model=configs", "--to=TO"], "is no run folder"),
    "a folder with something in it": (["--model=RUN", "--to=RUN"], "is not empty; choose a new or an empty folder"),
    "a file to write to": (["--model=RUN", "--to=README.md"], "is a file; it must be a new or an empty folder"),
    "a folder below a file": (["--model=RUN", "--to=README.md/below"], "no folder can be made"),
    "a URL": (["--model=RUN", "--to=gs://bucket/model"], "is a URL; it must be a local folder or a .safetensors file"),
    "another kind of file": (["--model=RUN", "--to=model.ckpt"], "written as .safetensors, e.g. model.safetensors"),
    "a name in capitals": (["--model=RUN", "--to=M.SAFETENSORS"], "written as .safetensors, e.g. M.safetensors"),
    "a place that takes nothing": (["--model=RUN", "--to=/proc/nowhere/run"], "no folder can be made in /proc"),
    "half precision of a run": (["--model=EXPORTED", "--to=TO", "--dtype=bfloat16"], "of a run are float32"),
    **{
        f"{flag} of a run": (["--model=EXPORTED", "--to=TO", f"--{flag}"], f"--{flag.split('=')[0]} is for {models}")
        for flag, models in {
            "vae=VAE": "diffusers models; --model is an exported run",
            "tokenizer=FOLDER": "diffusers models; --model is an exported run",
            "prediction=v": "diffusers models; --model is an exported run",
            "merge_lora=FILE": "diffusers models; --model is an exported run",
            "ema_sigma_rel=0.1": "run folders; --model is an exported run",
        }.items()
    },
}


@pytest.mark.parametrize("case", FLAGS)
def test_what_is_refused(case, trained_run, exported, tmp_path, capsys):
    flags, expected = FLAGS[case]
    names = {"=RUN": trained_run, "=TO": tmp_path / "to", "=EXPORTED": exported}
    for name, path in names.items():
        flags = [f"{flag.removesuffix(name)}={path}" if flag.endswith(name) else flag for flag in flags]
    assert expected in fails(flags, capsys)
    assert list(tmp_path.iterdir()) == []


def test_an_exported_run_without_its_recipe_is_class_conditional(exported, tmp_path):
    """As in diffusers: of the same parameters, and sampled as its index says."""
    copied = shutil.copytree(exported, tmp_path / "model")
    (copied / "recipe.json").unlink()
    index = json.loads((copied / "model_index.json").read_text())
    changes = {"num_inference_steps": 7, "guidance_scale": 1.5, "guidance_interval": [0, 0.5]}
    (copied / "model_index.json").write_text(json.dumps(index | changes))
    (run, run_params), (model, params) = load(exported), load(copied)
    assert content_hash(run_params) == content_hash(params)
    assert (model.class_names, model.origin.pipeline) == (run.class_names, "LatentDiffusionPipeline")
    defaults = model.defaults
    assert (defaults.steps, defaults.guidance, defaults.guidance_interval) == (7, 1.5, (0.0, 0.5))
    (copied / "model_index.json").write_text(json.dumps(index | {"guidance_scale": "much"}))
    with pytest.raises(InputError, match="is damaged: guidance_scale is 'much'"):
        load(copied)


DAMAGED = {  # what is done to an exported run -> what the line must say
    "half a recipe": (lambda f: cut_short(f / "recipe.json"), "recipe.json is damaged"),
    "a recipe of nothing": (lambda f: (f / "recipe.json").write_text("{}"), "it has no config and no data"),
    "a recipe of numbers": (lambda f: edit(f / "recipe.json", config=3), "its config is of another type"),
    "a recipe without classes": (lambda f: edit(f / "recipe.json", data={}), "its data is of another type"),
    "a recipe of fewer classes": (lambda f: edit(f / "recipe.json", data={"class_names": ["a"]}), "encoder_hid_proj"),
    "latents without scale": (lambda f: edit(f / "model_index.json", latents_scale=None), "latents_scale must be 2"),
    "half the weights": (lambda f: cut_short(f / "unet" / WEIGHTS), WEIGHTS),
    "no autoencoder": (lambda f: shutil.rmtree(f / "vae"), "there is no folder"),
    "another autoencoder": (
        lambda f: shutil.copy(f / "unet" / WEIGHTS, f / "vae" / WEIGHTS),
        "the state_dict does not fit this model",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_folder_is_refused(case, exported, tmp_path, capsys):
    damage, expected = DAMAGED[case]
    damage(shutil.copytree(exported, tmp_path / "model"))
    assert expected in fails([f"--model={tmp_path / 'model'}", f"--to={tmp_path / 'to'}"], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_runs_that_cannot_be_exported(trained_run, tmp_path, capsys):
    made = random_runs.random_run(tmp_path / "run")
    flags = [f"--model={made}", f"--to={tmp_path / 'to'}"]
    shutil.rmtree(made / "diffusion")
    assert "no readable checkpoint" in fails(flags, capsys)
    edit(made / "config.json", stages=["autoencoder"])
    assert "has no diffusion model" in fails(flags, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_failure_leaves_nothing(exported, tmp_path, monkeypatch, capsys):
    """Not even when the disk fills as the last file is written; an empty folder is as good as none."""

    def full(path, value):
        raise OSError(28, "No space left on device", str(path))

    (tmp_path / "to").mkdir()
    flags = [f"--model={exported}", f"--to={tmp_path / 'to'}"]
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_json", full)
        assert "No space left" in fails(flags, capsys, status=1)
    assert [*tmp_path.rglob("*")] == [tmp_path / "to"]
    assert command_line.run(convert.main, ["convert", *flags]) == 0
    assert (tmp_path / "to" / "config.json").is_file()


def test_help_is_quick():
    """It takes a quarter of a second: JAX is not imported."""
    code = (
        "import sys; from ldm_jax import convert; convert.main(['convert', '--help']); assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--to=" in done.stdout
