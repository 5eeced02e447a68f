#!/bin/sh
# Make a virtual environment with the dependencies of requirements.txt, as pinned in constraints.txt, both in the
# current folder. Use: install.sh cpu|cuda|cu126|... FOLDER
set -eu
variant=$1
environment=$2

version=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' constraints.txt)
[ -n "$version" ] || { echo "constraints.txt: has no line torch==VERSION" >&2; exit 2; }
index=https://download.pytorch.org/whl
case $variant in
*[!a-z0-9.]*) known=no ;;
cpu | cuda | cu[0-9]* | rocm[0-9]* | xpu) known=yes ;;
*) known=no ;;
esac
[ $known = yes ] || { echo "TORCH=$variant: expected cpu, cuda, or a folder of $index such as cu126" >&2; exit 2; }
if [ "$variant" = cuda ]; then
    set -- "torch===$version" # exactly this, from PyPI
else
    set -- --extra-index-url "$index/$variant" "torch==$version+$variant"
fi

python -m venv --without-pip "$environment"
install() { pip --python "$environment/bin/python" install --no-compile "$@"; }
# PyTorch first, alone and in its exact build, so that its index is asked for nothing else. Then the rest, from PyPI.
install --no-deps "$@"
install -c constraints.txt -r requirements.txt
pip --python "$environment/bin/python" check
"$environment/bin/python" - "$variant" << 'PYTHON'
import sys
import torch

cuda, wanted = torch.version.cuda, sys.argv[1] != "cpu"
if sys.argv[1].startswith(("cpu", "cu")) and bool(cuda) != wanted:
    sys.exit(f"installed torch {torch.__version__} (CUDA {cuda}), but TORCH is {sys.argv[1]}")
PYTHON

# What nothing here uses: headers and programs of PyTorch (but its helper for shared memory), and tests; those of NumPy
# stay, as its own modules import from them.
cd "$environment"/lib/python3.*/site-packages
rm -rf torch/include torch/test
find torch/bin -type f ! -name torch_shm_manager -delete
find . -type d -name tests ! -path './numpy/*' -prune -exec rm -rf {} +
# Compiled once and for all: at run time nothing can or may be written here. A few files are not for this Python.
python -m compileall -q --invalidation-mode unchecked-hash . > /dev/null || true
