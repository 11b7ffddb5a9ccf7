"""Models written here, opened in diffusers, which must not warn of anything."""

import logging
from contextlib import contextmanager

import diffusers


class _Recorder(logging.Handler):
    """Keeps the messages that are logged."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@contextmanager
def without_warnings():
    """diffusers may not warn of anything."""
    recorder, logger = _Recorder(), logging.getLogger("diffusers")
    logger.addHandler(recorder)
    try:
        yield
    finally:
        logger.removeHandler(recorder)
    assert recorder.lines == []


def open_quietly(name, folder):
    """diffusers' model from a folder; it must neither miss a key nor find one too many, nor warn of anything."""
    with without_warnings():
        model, info = getattr(diffusers, name).from_pretrained(
            folder, output_loading_info=True, low_cpu_mem_usage=False, use_safetensors=True
        )
    assert not any(info.values())
    return model.eval().requires_grad_(False)
