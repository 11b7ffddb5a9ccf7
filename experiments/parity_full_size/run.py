"""Are the outputs of Stable Diffusion's networks equal in ldm_jax and diffusers, at full width?

    make parity          # makes the virtual environment with torch, diffusers and transformers
    .venv-parity/bin/python -m experiments.parity_full_size.run [--budget=smoke|cpu] [--folder=FOLDER for 11 GB]

For each network of models.py diffusers writes a folder with random weights, and both libraries run on the same inputs
in separate processes, so that memory is measured separately. Networks in results.json are skipped; --loading=NAME
measures the memory of loading one of them again.
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
SIZE, LENGTH = 32, 77  # of latents (images: 128 pixels), of prompts in tokens

Outputs = dict[str, np.ndarray]


def inputs_of(name: str) -> Outputs:
    """Random inputs of a network, NHWC."""
    class_name, config = NETWORKS[name]
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    if class_name.startswith("CLIP"):
        ids = rng.integers(1, 49406, (2, LENGTH))
        ids[0, 20:] = ids[1, -1] = 49407  # where the text ends
        return {"ids": ids.astype(np.int32)}
    if class_name in ("AutoencoderKL", "VQModel"):
        return {"x": np.tanh(normal(1, 4 * SIZE, 4 * SIZE, 3)), "z": normal(1, SIZE, SIZE, config["latent_channels"])}
    inputs = {"z_t": normal(2, SIZE, SIZE, config.get("in_channels", 4)), "t": np.array([3, 871])}
    if class_name == "UNet2DConditionModel":
        inputs["context"] = normal(2, LENGTH, config["cross_attention_dim"])
    if "num_class_embeds" in config:
        inputs["class_labels"] = np.array([20, 350])
    if "addition_embed_type" in config:
        inputs |= {"pooled": normal(2, 1280), "sizes": np.tile(np.float32([1024, 1024, 0, 0, 1024, 1024]), (2, 1))}
    return inputs


def random_model(name: str, folder: Path) -> Any:
    """A network of diffusers or transformers with random weights; writes its folder."""
    import diffusers
    import torch
    import transformers

    class_name, config = NETWORKS[name]
    torch.manual_seed(0)
    if class_name.startswith("CLIP"):
        model = getattr(transformers, class_name)(transformers.CLIPTextConfig(**config))
    else:
        model = getattr(diffusers, class_name)(**config)
    model.eval().requires_grad_(False)
    for parameter_name, p in model.named_parameters():  # also biases and norms, so that no 0 or 1 hides a difference
        p.normal_()
        if p.ndim > 1:
            p.mul_(p[0].numel() ** -0.5)
        elif parameter_name.endswith("weight"):
            p.mul_(0.2).add_(1)
    model.save_pretrained(folder)
    return model


def write(name: str, folder: Path) -> None:
    """Writes the folder of a network with random weights."""
    random_model(name, folder)


def run_diffusers(name: str, folder: Path) -> tuple[Outputs, int]:
    """Writes the folder; returns the outputs of diffusers and the number of parameters."""
    import torch

    class_name, model = NETWORKS[name][0], random_model(name, folder)
    tensors = {k: torch.from_numpy(v) for k, v in inputs_of(name).items()}
    nchw = {k: tensors[k].permute(0, 3, 1, 2).contiguous() for k in ("x", "z", "z_t") if k in tensors}
    if class_name.startswith("CLIP"):
        output = model(tensors["ids"].long(), output_hidden_states=True)
        pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
        outputs = {"last": output.last_hidden_state, "penultimate": output.hidden_states[-2], "pooled": pooled}
    elif "x" in nchw:
        encoded = model._encode(nchw["x"]) if class_name == "AutoencoderKL" else model.encode(nchw["x"]).latents
        outputs = {"encode": encoded, "decode": model.decode(nchw["z"]).sample}
    else:
        kwargs = {"encoder_hidden_states": tensors.get("context"), "class_labels": tensors.get("class_labels")}
        if "pooled" in tensors:
            kwargs["added_cond_kwargs"] = {"text_embeds": tensors["pooled"], "time_ids": tensors["sizes"]}
        kwargs = {k: v for k, v in kwargs.items() if v is not None}
        outputs = {"output": model(nchw["z_t"], tensors["t"], **kwargs).sample}
    arrays = {k: v.numpy() for k, v in outputs.items()}
    channels_last = {k: np.moveaxis(v, 1, -1) if v.ndim == 4 else v for k, v in arrays.items()}
    return channels_last, sum(p.numel() for p in model.parameters())


def run_ldm_jax(name: str, folder: Path, dtype: str) -> Outputs:
    """The outputs of ldm_jax for the network in the folder."""
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
    """The peak memory of loading the weights to the devices, relative to their size.

    Measured as the increase of the process's resident set, mapped files included, after importing JAX and ldm_jax.
    """
    from ldm_jax.runtime.xla import configure

    configure()

    import jax

    import ldm_jax.pipeline.from_diffusers  # noqa: F401 (import before measuring)
    from ldm_jax.runtime.parallel import replicate

    jax.devices()
    with MemoryPeak() as peak:
        params = load(name, folder, dtype)[1]
        on_devices = jax.block_until_ready(replicate(params))
    return peak.bytes / sum(leaf.nbytes for leaf in jax.tree.leaves(on_devices))


def load(name: str, folder: Path, dtype: str) -> tuple[Any, Any]:
    """Loads the module and its parameters from the folder."""
    import jax.numpy as jnp

    from ldm_jax.interop.folder import load_autoencoder, load_unet
    from ldm_jax.pipeline.from_diffusers import load_text_encoder

    class_name = NETWORKS[name][0]
    if class_name.startswith("CLIP"):
        return load_text_encoder(folder, dtype)
    loader = load_autoencoder if class_name in ("AutoencoderKL", "VQModel") else load_unet
    return loader(folder, dtype=jnp.dtype(dtype), params_dtype=jnp.dtype(dtype))[:2]


class MemoryPeak:
    """Context manager of the peak increase of the process's memory, `bytes`, sampled every 10 ms (Linux)."""

    def __enter__(self) -> "MemoryPeak":
        self.before, self.bytes, self.done = self._now(), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.done.wait(0.01):
            self.bytes = max(self.bytes, self._now() - self.before)

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def difference(a: Outputs, b: Outputs) -> float:
    """The largest absolute difference of any output, relative to the largest absolute value of that output."""
    return max(float(np.abs(a[k] - b[k]).max() / np.abs(b[k]).max()) for k in b)


def in_subprocess(function: Callable, *args: object) -> Any:
    """Calls the function in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *args).result()


def compare(name: str, folder: Path) -> dict[str, float]:
    """The row of a network in results.json."""
    expected, parameters = in_subprocess(run_diffusers, name, folder)
    return {
        "parameters": parameters,
        "float32": difference(in_subprocess(run_ldm_jax, name, folder, "float32"), expected),
        "bfloat16": difference(in_subprocess(run_ldm_jax, name, folder, "bfloat16"), expected),
        **loading(name, folder),
    }


def loading(name: str, folder: Path) -> dict[str, float]:
    """The memory columns of the row: peak of loading, relative to the weights."""
    types = {"loading_memory": "float32", "loading_memory_bfloat16": "bfloat16"}
    return {column: in_subprocess(loading_memory, name, folder, dtype) for column, dtype in types.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=BUDGETS, default="cpu")
    parser.add_argument("--loading", choices=NETWORKS, metavar="NAME", help="measure the loading of this network again")
    parser.add_argument("--folder", help="folder for the temporary weights; default: the system's")
    args = parser.parse_args()
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in [args.loading] if args.loading else BUDGETS[args.budget]:
        if name not in results or args.loading:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                if args.loading:
                    in_subprocess(write, name, Path(folder))
                    results[name] |= loading(name, Path(folder))
                else:
                    results[name] = compare(name, Path(folder))
            path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name:>30}  " + "  ".join(f"{key} {value:.3g}" for key, value in results[name].items()), flush=True)


if __name__ == "__main__":
    main()
