#!/usr/bin/env bash
# Packs what a machine with a GPU but without a network lacks for README.md's commands: wheels and Fashion-MNIST.
#
#     experiments/gpu/pack.sh HAVE [FOLDER=gpu_pack] [PYTHON=3.12]
#
# HAVE is the output of `python3 -m pip list --format=freeze` on that machine, PYTHON its version. FOLDER gets tar files
# of at most 40 MB, for connections with a limit. In the repository on that machine:
#
#     cat gpu_pack/part_* | tar -x
#     python3 -m pip install --no-index --no-deps --target gpu_pack/site gpu_pack/wheels/*.whl
#     export PYTHONPATH=gpu_pack/site
set -euo pipefail
cd "$(dirname "$0")/../.."

[[ $# -ge 1 && -f $1 ]] || { sed -n '2,/^set/{/^set/d;s/^# \?//p}' "$0" >&2; exit 2; }
have=$1 folder=${2:-gpu_pack} python=${3:-3.12}
[[ -d data/fashion_mnist && -d .venv-parity ]] || {
	echo "pack.sh: data/fashion_mnist and .venv-parity are needed; \`make test parity\` makes both" >&2
	exit 2
}
glibc=(17 24 27 28 31 34 35)
target=(--only-binary=:all: --python-version "$python" --implementation cp --platform manylinux2014_x86_64)
for version in "${glibc[@]}"; do target+=(--platform "manylinux_2_${version}_x86_64"); done

[[ ! -e $folder ]] || {
	echo "pack.sh: $folder exists; choose a new folder" >&2
	exit 2
}
mkdir -p "$folder/wheels"
.venv-parity/bin/python - "$have" > "$folder/missing.txt" <<'PYTHON'
"""Prints what the requirements need, without the packages that are there, in the versions of .venv-parity."""
import re, sys
from importlib.metadata import distribution
from packaging.requirements import Requirement

def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()

there = {canonical(re.split("==| @ ", line)[0].strip()) for line in open(sys.argv[1])}
lines = [line.split("#")[0].strip() for line in open("requirements.txt")]
wanted, missing = [*filter(None, lines), "diffusers", "hypothesis", "pytest-xdist"], {}
while wanted:
    requirement = Requirement(wanted.pop())
    name = canonical(requirement.name)
    if name in there or name in missing or requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        continue
    package = distribution(name)
    missing[name] = package.version
    wanted += package.requires or []
print(*(f"{name}=={version}" for name, version in sorted(missing.items())), sep="\n")
PYTHON
while read -r package; do
	.venv-parity/bin/python -m pip download --quiet --no-deps "${target[@]}" -d "$folder/wheels" "$package" 2>/dev/null ||
		.venv-parity/bin/python -m pip wheel --quiet --no-deps -w "$folder/wheels" "$package" # has no wheel in the index
done < "$folder/missing.txt"
tar -c --transform 's,^wheels,gpu_pack/wheels,' data/fashion_mnist -C "$folder" wheels |
	split --bytes=40M - "$folder/part_"
rm -r "$folder/wheels"
du -h "$folder"/part_*
