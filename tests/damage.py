"""Damage to the files of checkpoints."""


def array_files(checkpoint):
    """All of them: Orbax's threads share the arrays out over files as it happens, and not every file is read back."""
    return [path for path in checkpoint.rglob("d/*") if path.is_file()]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
