"""Compiling Stable Diffusion for TPU slices: the model folder, the command of each row, the table; nothing compiles."""

import json
import subprocess

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments.parity_full_size.models import NETWORKS
from experiments.scaling import models, run
from experiments.scaling.run import ARMS, Arm
from ldm_jax import command_line, train
from ldm_jax.config.rules import validate_devices
from ldm_jax.interop.modules import abstract_params, unet_from_config
from ldm_jax.pipeline.load import load

GB = 2**30
UNETS = {
    "SD 1.5": {"block_out_channels": (32, 32, 32, 32), "attention_head_dim": 2, "cross_attention_dim": 16},
    "SDXL": {"block_out_channels": (32, 32, 32), "attention_head_dim": 2, "transformer_layers_per_block": 1,
             "cross_attention_dim": 32, "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 36},
}  # fmt: skip
VAE = {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2,
       "up_block_types": ("UpDecoderBlock2D",) * 2}  # fmt: skip
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def prediction():
    return {"arithmetic": 0.2, "memory": 0.1, "communication": 0.05, "images_per_second": 256.0, "utilization": 0.8}


def row(arm, *, fits=True):
    """A row as the command leaves it."""
    memory = {"parameters": GB, "EMA": GB, "optimizer": 2 * GB, "frozen": 0, "data": 0, "activations": 3 * GB,
              "temporaries": 5 * GB, "program, padding": 0}  # fmt: skip
    stage = {"memory": memory, "memory_total": 12 * GB, "fits": fits, "change": [] if fits else ["--config.a=1"],
             "collectives": {"all-gather": {"count": 2, "bytes": 3 * GB, "sent": 3 * GB}}}  # fmt: skip
    stage |= {"prediction": prediction()} if fits else {}
    report = {"compiled_for": arm.slice, "memory": 16 * GB, "stages": {"diffusion": stage}}
    return {"arm": arm._asdict(), "commit": "abc", "seconds": 3, "report": report}


@pytest.mark.parametrize(("name", "latents"), [("SD 1.5", 64), ("SDXL", 128)])
def test_a_model_of_zeros_is_a_pipeline_of_its_sizes(name, latents, tmp_path, monkeypatch):
    small = {models.MODELS[name][1]: UNETS[name], "VAE of SD 1, 2 and XL": VAE, models.CLIP_L: TEXT,
             models.CLIP_BIG_G: TEXT | {"projection_dim": 12}}  # fmt: skip
    networks = {name: (NETWORKS[name][0], NETWORKS[name][1] | fields) for name, fields in small.items()}
    monkeypatch.setattr(models, "NETWORKS", networks)
    counts = models.write_model(name, tmp_path / "model")
    model, params = load(tmp_path / "model")
    parts = [params["denoiser"], params["first_stage"], *params["conditioning"]]
    assert list(counts.values()) == [sum(leaf.size for leaf in jax.tree.leaves(part)) for part in parts]
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(params["denoiser"]))
    assert model.latent_shape == (latents, latents, 4)


@pytest.mark.parametrize(("name", "million"), [("UNet of SD 1", 859.5), ("UNet of SDXL", 2567.5)])
def test_the_unets_have_their_published_sizes(name, million):
    unet = unet_from_config({"_class_name": "UNet2DConditionModel", **NETWORKS[name][1]})
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(unet)))
    assert round(count / 1e6, 1) == million


def test_the_slices_and_batches_of_the_rows():
    assert [Arm("SD 1.5", name, "fsdp", 4).chips for name in ("v5e:4x4", "v5e:16x16", "v5p:2x2x4")] == [16, 256, 16]
    assert len({arm.name for arm in ARMS}) == len(ARMS)
    assert Arm("SDXL", "v5e:4x4", "fsdp", 1, remat=True, lora=8).name == (
        "SDXL, v5e:4x4, fsdp, 1 a chip, remat, LoRA of rank 8"
    )


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_the_command_of_a_row_is_one_that_the_config_takes(arm, tmp_path, capsys):
    """--print_config checks every field."""
    flags = [flag for flag in run.command(arm, tmp_path)[3:] if not flag.startswith("--compile_for")]
    assert command_line.run(train.main, ["train", "--print_config", *flags]) == 0
    config = json.loads(capsys.readouterr().out)
    validate_devices(ConfigDict(config), arm.chips)
    assert config["diffusion"]["batch_size"] == arm.chips * arm.per_chip
    assert (config["parallel"]["engine"], config["parallel"]["fsdp"]) == (arm.engine, arm.fsdp)
    assert config["lora"]["rank"] == arm.lora
    assert config["data"]["image_size"] == (512 if arm.model == "SD 1.5" else 1024)


def test_the_images_have_captions(tmp_path):
    run.write_images(tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == run.IMAGES == len({path.read_text() for path in tmp_path.glob("*.txt")})


def test_the_table_says_what_fits_and_what_to_change():
    arms = ARMS[0], ARMS[2]
    lines = run.table({arms[0].name: row(arms[0]), arms[1].name: row(arms[1], fits=False)}).splitlines()
    assert lines[2].split(" | ")[4:9] == ["4.00", "8.00", "16", "yes", "3.00"]
    assert "no: `--config.a=1`" in lines[3] and "256" in lines[2] and "256" not in lines[3].split(" | ")[-2]
    assert "| fsdp over 16 |" in lines[3]
    widths = [bar.get_width() for bar in run.figure({arms[0].name: row(arms[0])}).axes[0].patches]
    np.testing.assert_allclose(widths, [4, 3, 5])


def test_rows_are_measured_once(tmp_path, monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(run, "measure", lambda arm, folder: measured.append(arm) or row(arm))
    command = ["run", f"--out={tmp_path / 'results.json'}", f"--folder={tmp_path}", "--only", ARMS[1].name]
    for names, count in (([], 1), ([], 1), ([ARMS[0].name], 2)):
        monkeypatch.setattr("sys.argv", [*command, *names])
        run.main()
        assert len(measured) == count
    assert list(json.loads((tmp_path / "results.json").read_text())) == [ARMS[0].name, ARMS[1].name]
    assert (tmp_path / "figure.png").exists() and "| SD 1.5 | v5e:16x16 |" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*command, "SD 3"])
    with pytest.raises(SystemExit):
        run.main()
    assert "there is no row 'SD 3'" in capsys.readouterr().err


def test_a_command_without_a_report_ends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "prepare", lambda *arguments: None)
    failed = subprocess.CompletedProcess([], 2, "", "no libtpu")
    monkeypatch.setattr(run.subprocess, "run", lambda *arguments, **options: failed)
    with pytest.raises(SystemExit, match="no libtpu"):
        run.measure(ARMS[0], tmp_path)
    too_large = f"Data\n{json.dumps(row(ARMS[0], fits=False)['report'])}\n"
    monkeypatch.setattr(failed, "stdout", too_large)
    assert not run.measure(ARMS[0], tmp_path)["report"]["stages"]["diffusion"]["fits"]
