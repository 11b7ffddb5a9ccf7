"""Do the networks of Stable Diffusion say here what they say in diffusers, at their full width?

    make parity          # makes the virtual environment with torch, diffusers and transformers
    .venv-parity/bin/python -m experiments.parity_full_size.run [--budget=smoke|cpu] [--folder=FOLDER for 11 GB]

Each network of models.py: diffusers draws random weights and writes its folder, both sides read the same inputs; one
process for each, so that no memory is counted twice. Networks that are in results.json already are passed over, unless
--loading=NAME asks for what loading them takes to be measured again.
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


def drawn(name: str, folder: Path) -> Any:
    """Diffusers' or transformers' network with random weights; writes its folder."""
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
    return model


def write(name: str, folder: Path) -> None:
    """The folder alone."""
    drawn(name, folder)


def theirs(name: str, folder: Path) -> tuple[Outputs, int]:
    """Writes the folder; gives diffusers' outputs and the number of parameters."""
    import torch

    kind, model = NETWORKS[name][0], drawn(name, folder)
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


def ours(name: str, folder: Path, dtype: str) -> Outputs:
    """Our outputs."""
    import jax

    from ldm_jax.models.unet import Added
    from ldm_jax.runtime.xla import configure

    configure()
    module, params = load(name, folder, dtype)
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
    return {k: np.asarray(v, np.float32) for k, v in outputs.items()}


def loading_memory(name: str, folder: Path, dtype: str) -> float:
    """The most memory that loading took, until the devices had the weights, as a multiple of these.

    It is all that the process gains, pages of mapped files too, once JAX and ours are imported.
    """
    from ldm_jax.runtime.xla import configure

    configure()

    import jax

    import ldm_jax.pipeline.from_diffusers  # noqa: F401 (so that its imports are over)
    from ldm_jax.runtime.parallel import replicate

    jax.devices()
    with MemoryPeak() as peak:
        params = load(name, folder, dtype)[1]
        on_devices = jax.block_until_ready(replicate(params))
    return peak.bytes / sum(leaf.nbytes for leaf in jax.tree.leaves(on_devices))


def load(name: str, folder: Path, dtype: str) -> tuple[Any, Any]:
    """The module and its parameters from the folder."""
    import jax.numpy as jnp

    from ldm_jax.interop.folder import load_autoencoder, load_unet
    from ldm_jax.pipeline.from_diffusers import load_text_encoder

    kind = NETWORKS[name][0]
    if kind.startswith("CLIP"):
        return load_text_encoder(folder, dtype)
    loader = load_autoencoder if kind in ("AutoencoderKL", "VQModel") else load_unet
    return loader(folder, dtype=jnp.dtype(dtype), params_dtype=jnp.dtype(dtype))[:2]


class MemoryPeak:
    """The most memory that the process gains in the block, in bytes, looked at every 10 ms (Linux)."""

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
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def difference(a: Outputs, b: Outputs) -> float:
    """The largest difference anywhere, relative to the largest value of that output."""
    return max(float(np.abs(a[k] - b[k]).max() / np.abs(b[k]).max()) for k in b)


def alone(function: Callable, *args: object) -> Any:
    """What the function gives in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *args).result()


def compare(name: str, folder: Path) -> dict[str, float]:
    """A row of results.json."""
    expected, parameters = alone(theirs, name, folder)
    return {
        "parameters": parameters,
        "float32": difference(alone(ours, name, folder, "float32"), expected),
        "bfloat16": difference(alone(ours, name, folder, "bfloat16"), expected),
        **loading(name, folder),
    }


def loading(name: str, folder: Path) -> dict[str, float]:
    """Those columns of it that tell of memory."""
    types = {"loading_memory": "float32", "loading_memory_bfloat16": "bfloat16"}
    return {column: alone(loading_memory, name, folder, dtype) for column, dtype in types.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=BUDGETS, default="cpu")
    parser.add_argument("--loading", choices=NETWORKS, metavar="NAME", help="measure the loading of this network again")
    parser.add_argument("--folder", help="where the weights are put meanwhile; default: the system's temporary folder")
    args = parser.parse_args()
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in [args.loading] if args.loading else BUDGETS[args.budget]:
        if name not in results or args.loading:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                if args.loading:
                    alone(write, name, Path(folder))
                    results[name] |= loading(name, Path(folder))
                else:
                    results[name] = compare(name, Path(folder))
            path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name:>30}  " + "  ".join(f"{key} {value:.3g}" for key, value in results[name].items()), flush=True)


if __name__ == "__main__":
    main()
