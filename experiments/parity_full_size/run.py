"""Do the networks of Stable Diffusion say here what they say in diffusers, at their full width?

    make parity          # makes the virtual environment with torch, diffusers and transformers
    .venv-parity/bin/python -m experiments.parity_full_size.run [--budget=smoke|cpu] [--folder=FOLDER for 11 GB]

Each network of models.py: diffusers draws random weights and writes its folder, both sides read the same inputs; one
process for each, so that no memory is counted twice. Networks that are in results.json already are passed over.
"""

import argparse
import json
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from experiments.parity_full_size.models import NETWORKS

HERE = Path(__file__).parent
BUDGETS = {"smoke": [*NETWORKS][:1], "cpu": [*NETWORKS]}
SIZE, LENGTH = 32, 77  # of latents (pictures: 128), of texts

Outputs = dict[str, np.ndarray]


def inputs_of(name: str) -> Outputs:
    """What both sides are given: NHWC."""
    kind, config = NETWORKS[name]
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    if kind.startswith("CLIP"):
        ids = rng.integers(1, 49406, (2, LENGTH))
        ids[0, 20:] = ids[1, -1] = 49407  # where the text ends
        return {"ids": ids.astype(np.int32)}
    if kind in ("AutoencoderKL", "VQModel"):
        return {"x": np.tanh(draw(1, 4 * SIZE, 4 * SIZE, 3)), "z": draw(1, SIZE, SIZE, config["latent_channels"])}
    inputs = {"z_t": draw(2, SIZE, SIZE, config.get("in_channels", 4)), "t": np.array([3, 871])}
    if kind == "UNet2DConditionModel":
        inputs["context"] = draw(2, LENGTH, config["cross_attention_dim"])
    if "num_class_embeds" in config:
        inputs["class_labels"] = np.array([20, 350])
    if "addition_embed_type" in config:
        inputs |= {"pooled": draw(2, 1280), "sizes": np.tile(np.float32([1024, 1024, 0, 0, 1024, 1024]), (2, 1))}
    return inputs


def theirs(name: str, folder: Path) -> tuple[Outputs, int]:
    """Writes the folder; gives diffusers' outputs and the number of parameters."""
    import diffusers
    import torch
    import transformers

    kind, config = NETWORKS[name]
    torch.manual_seed(0)
    if kind.startswith("CLIP"):
        model = getattr(transformers, kind)(transformers.CLIPTextConfig(**config))
    else:
        model = getattr(diffusers, kind)(**config)
    model.eval().requires_grad_(False)
    for parameter_name, p in model.named_parameters():  # all of them, so that no 0 or 1 hides a difference
        p.normal_()
        if p.ndim > 1:
            p.mul_(p[0].numel() ** -0.5)
        elif parameter_name.endswith("weight"):
            p.mul_(0.2).add_(1)
    model.save_pretrained(folder)

    tensors = {k: torch.from_numpy(v) for k, v in inputs_of(name).items()}
    nchw = {k: tensors[k].permute(0, 3, 1, 2).contiguous() for k in ("x", "z", "z_t") if k in tensors}
    if kind.startswith("CLIP"):
        said = model(tensors["ids"].long(), output_hidden_states=True)
        pooled = said.text_embeds if "text_embeds" in said else said.pooler_output
        outputs = {"last": said.last_hidden_state, "penultimate": said.hidden_states[-2], "pooled": pooled}
    elif "x" in nchw:
        encoded = model._encode(nchw["x"]) if kind == "AutoencoderKL" else model.encode(nchw["x"]).latents
        outputs = {"encode": encoded, "decode": model.decode(nchw["z"]).sample}
    else:
        named = {"encoder_hidden_states": tensors.get("context"), "class_labels": tensors.get("class_labels")}
        if "pooled" in tensors:
            named["added_cond_kwargs"] = {"text_embeds": tensors["pooled"], "time_ids": tensors["sizes"]}
        named = {k: v for k, v in named.items() if v is not None}
        outputs = {"output": model(nchw["z_t"], tensors["t"], **named).sample}
    arrays = {k: v.numpy() for k, v in outputs.items()}
    channels_last = {k: np.moveaxis(v, 1, -1) if v.ndim == 4 else v for k, v in arrays.items()}
    return channels_last, sum(p.numel() for p in model.parameters())


def ours(name: str, folder: Path, dtype: str) -> tuple[Outputs, float]:
    """Our outputs, and the most memory that loading took, as a multiple of the weights.

    Memory is that of the process itself, without the pages of the weight files, which the system may drop.
    """
    import jax

    from ldm_jax.models.unet import Added
    from ldm_jax.xla import configure

    configure()
    with MemoryPeak() as peak:
        module, params = load(name, folder, dtype)
        params = jax.block_until_ready(jax.tree.map(jax.numpy.asarray, params))
    inputs = inputs_of(name)
    if "x" in inputs:
        calls = {"encode": (inputs["x"],), "decode": (inputs["z"],)}
        run = lambda params, args, method: module.apply({"params": params}, *args, method=method)  # noqa: E731
        run = jax.jit(run, static_argnums=2)
        outputs = {method: run(params, args, method) for method, args in calls.items()}
    else:
        if "pooled" in inputs:
            inputs["added"] = Added(inputs.pop("pooled"), inputs.pop("sizes"))
        apply = jax.jit(lambda params, inputs: module.apply({"params": params}, **inputs))
        outputs = apply(params, inputs)
        outputs = outputs._asdict() if "ids" in inputs else {"output": outputs}
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {k: np.asarray(v, np.float32) for k, v in outputs.items()}, peak.bytes / weights


def load(name: str, folder: Path, dtype: str) -> tuple[Any, Any]:
    """The module and its parameters from the folder."""
    import jax.numpy as jnp

    from ldm_jax.interop.folder import load_autoencoder, load_unet
    from ldm_jax.pretrained import load_text_encoder

    kind = NETWORKS[name][0]
    if kind.startswith("CLIP"):
        return load_text_encoder(folder, dtype)
    loader = load_autoencoder if kind in ("AutoencoderKL", "VQModel") else load_unet
    return loader(folder, dtype=jnp.dtype(dtype), params_dtype=jnp.dtype(dtype))[:2]


class MemoryPeak:
    """The most anonymous memory that the process gains in the block, in bytes, looked at every 10 ms (Linux)."""

    def __enter__(self) -> "MemoryPeak":
        self.before, self.bytes, self.over = self._now(), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.over.wait(0.01):
            self.bytes = max(self.bytes, self._now() - self.before)

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def difference(a: Outputs, b: Outputs) -> float:
    """The largest difference anywhere, relative to the largest value of that output."""
    return max(float(np.abs(a[k] - b[k]).max() / np.abs(b[k]).max()) for k in b)


def compare(name: str, folder: Path) -> dict[str, float]:
    """A row of results.json."""

    def alone(function: Callable, *args: object) -> Any:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            return process.submit(function, name, folder, *args).result()

    expected, parameters = alone(theirs)
    exact, memory = alone(ours, "float32")
    rough, rough_memory = alone(ours, "bfloat16")
    return {
        "parameters": parameters,
        "float32": difference(exact, expected),
        "bfloat16": difference(rough, expected),
        "loading_memory": memory,
        "loading_memory_bfloat16": rough_memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=BUDGETS, default="cpu")
    parser.add_argument("--folder", help="where the weights are put meanwhile; default: the system's temporary folder")
    args = parser.parse_args()
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in BUDGETS[args.budget]:
        if name not in results:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                results[name] = compare(name, Path(folder))
            path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name:>30}  " + "  ".join(f"{key} {value:.3g}" for key, value in results[name].items()), flush=True)


if __name__ == "__main__":
    main()
