#!/usr/bin/env bash
# Creates or completes the virtual environment VENV: an OpenMMLab stack, mmslak itself (editable) and what they need.
#
# demo is the onedl stack for classification and segmentation alone: mmcv is pure Python, so that nothing is compiled.
# onedl adds detection and what the tests need to the same environment; stock is the other stack, in one of its own.
# Both need mmcv's operators, for which no wheel on PyPI fits. They are compiled once, and the wheel is kept in a cache keyed
# by the torch version and the Python tag: a second environment takes seconds and never gets a wheel built for another torch.
#
# Usage: tools/setup_env.sh {demo|onedl|stock} VENV [PYTHON]
set -euo pipefail
kind=${1:?demo, onedl or stock} venv=${2:?folder of the environment} python=${3:-}
cd "$(dirname "$0")/.."
if [ -z "$python" ]; then
    python=$("$venv/bin/python" -c 'import sys; print(sys._base_executable)' 2>/dev/null) || python=python3
fi
version() { "$1" -c 'import sys; print(*sys.version_info[:3])' 2>/dev/null || true; }

case $kind in
demo | onedl) torch=(torch==2.13.0) vision=(torchvision==0.28.0) mmcv=onedl-mmcv==2.3.6 build=('setuptools<81' wheel ninja numpy psutil) ;;
stock) torch=(torch==2.1.2 'numpy<2') vision=(torchvision==0.16.2) mmcv=mmcv==2.1.0 build=('setuptools<70' wheel ninja psutil) ;;
*) echo "setup_env.sh: unknown environment '$kind': expected demo, onedl or stock" >&2; exit 2 ;;
esac

say() { printf '\n[%s] %s\n' "$(date +%H:%M:%S)" "$*"; }

# The tests open a report in a browser where there is one. Installing it is up to whoever owns the machine, so this is done
# only when asked for (MMSLAK_BROWSER=1) or in CI, and only where root and apt-get can do it.
if [ "$kind" != demo ] && [ -n "${MMSLAK_BROWSER:-}${CI:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null &&
    ! command -v chromium >/dev/null && ! command -v google-chrome >/dev/null; then
    say 'Chromium for the tests (apt-get)'
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium; } >/dev/null 2>&1 ||
        echo 'setup_env.sh: no chromium to be had by apt-get; the tests that need a browser are skipped' >&2
fi

# The stamp holds what the environment was made from, and of which kind it is; a change of any of it makes a new one.
# One that is complete serves the demo as well.
stamp=$venv/.mmslak-stamp
want=$(cat setup.py tools/setup_env.sh | cksum)" $(version "$python")"
case $(cat "$stamp" 2>/dev/null || true) in
"$want $kind") exit 0 ;;
"$want onedl") if [ "$kind" = demo ]; then exit 0; fi ;;
esac

"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' ||
    { echo "setup_env.sh: $python is $("$python" --version 2>&1); Python 3.10, 3.11 or 3.12 is needed (make … PYTHON=python3.11)" >&2; exit 2; }
if [ "$kind" = stock ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' ||
        { echo "setup_env.sh: the stock stack needs Python 3.10, got $("$python" --version 2>&1): make test-stock PYTHON=python3.10" >&2; exit 2; }
fi

say "Step 1 of 4: environment $venv with torch (about 1 minute beside the download of torch)"
rm -f "$stamp"
clear=; [ "$(version "$venv/bin/python")" = "$(version "$python")" ] || clear=--clear
"$python" -m venv $clear "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet --upgrade 'pip<26' "${build[@]}"
pip install --quiet "${torch[@]}"
# torchvision's own requirement of torch is met already; without --no-deps a CPU build of torch could be replaced.
pip install --quiet --no-deps "${vision[@]}"

if [ "$kind" = demo ]; then
    say 'Step 2 of 4: mmcv without its operators (about 10 s)'
    # Its setup.py leaves them out where it does not see torch, as in pip's isolated build. The cache is passed over, since a
    # wheel with operators, maybe for another torch, could be in it.
    pip install --quiet --no-deps --no-cache-dir --no-binary "${mmcv%%==*}" "$mmcv"
    extras=onedl-demo,demo modules='mmseg.models, mmpretrain.models' time='1 minute'
else
    key=$("$venv/bin/python" -c 'import sys, torch; print(f"torch{torch.__version__}-cp{sys.version_info[0]}{sys.version_info[1]}")')
    cache=${MMSLAK_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mmslak}/wheels/$key
    wheel=${mmcv%%==*}; wheel=${wheel//-/_}-${mmcv##*==}
    if compgen -G "$cache/$wheel-*.whl" >/dev/null; then
        say "Step 2 of 4: mmcv's operators are in the cache ($cache)"
    else
        jobs=${MAX_JOBS:-$(nproc 2>/dev/null || sysctl -n hw.ncpu)}
        say "Step 2 of 4: building mmcv's operators with $jobs jobs (about 4 minutes on 2 cores with GCC, else up to 12; once, then kept in $cache)"
        mkdir -p "$cache"
        build_dir=$(mktemp -d "$cache/build.XXXXXX")
        trap 'rm -rf "$build_dir"' EXIT
        # In the place of Python's own flags, which ask for debug information: that takes half of the compiler's time.
        if ! MMCV_WITH_OPS=1 MAX_JOBS=$jobs CFLAGS="${CFLAGS:--O3 -DNDEBUG -fwrapv} -g0" PATH="$(cd "$venv" && pwd)/bin:$PATH" \
            MMSLAK_CXX=${CXX:-c++} MMSLAK_HEADER=$build_dir/header.h CXX=$PWD/tools/cxx_with_header.sh \
            "$venv/bin/python" -m pip --disable-pip-version-check wheel --no-build-isolation --no-deps --no-binary "${mmcv%%==*}" \
            --wheel-dir "$build_dir" "$mmcv" >"$build_dir/log" 2>&1; then
            tail -n 40 "$build_dir/log" >&2
            echo "setup_env.sh: building $mmcv failed (above: the end of its log); a C++ compiler and Python's headers are needed" >&2
            exit 1
        fi
        mv "$build_dir"/*.whl "$cache/"
    fi
    pip install --quiet --no-deps --force-reinstall "$cache/$wheel"-*.whl # in the place of one without operators
    extras=$kind,dev modules='mmcv.ops, mmdet.models, mmseg.models, mmpretrain.models' time='2 minutes'
fi

say "Step 3 of 4: OpenMMLab's libraries and mmslak (about $time)"
pip install --quiet --no-build-isolation --editable ".[$extras]"

# torch's builds for GPUs bring triton along; on a CPU its interpreter runs the tests of the kernels.
if [ "$kind $(uname -sm)" = 'onedl Linux x86_64' ] && ! "$venv/bin/python" -c 'import triton' 2>/dev/null; then
    pip install --quiet triton==3.8.0
fi

# For the tests of whole detectors' export; see DEPLOY in setup.py. Its wheels are for this platform alone.
if [ "$kind" != demo ] && [ "$(uname -sm)" = 'Linux x86_64' ]; then
    pip install --quiet --no-deps mmdeploy==1.3.1
fi

# Servers have no libGL, which opencv-python wants and its headless twin does not.
if ! "$venv/bin/python" -c 'import cv2' 2>/dev/null; then
    version=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("opencv-python"))')
    pip install --quiet --force-reinstall --no-deps "opencv-python-headless==$version"
fi

say 'Step 4 of 4: importing everything (about 15 s)'
"$venv/bin/python" -W ignore -c "import mmslak, $modules"
printf '%s' "$want $kind" >"$stamp"
say "Environment $venv is ready; to use it: . $venv/bin/activate"
