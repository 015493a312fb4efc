#!/usr/bin/env bash
# Installs fastkm in an empty Debian 12 without a compiler, and runs it: the wheel of dist/ as pip installs it there, and
# the sources with the pip and setuptools of Debian 12, as README.md has it. Needs root, debootstrap and a wheel from
# `make wheel`.
#   ROOTFS   folder of the Debian, made if it is not there (build/empty_root)
#   WHEELS   folder with wheels that pip need not download, that of torch for example (none)
#   TORCH    what pip is asked for beside fastkm (torch, of which pip takes the newest)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
rootfs=${ROOTFS:-build/empty_root}
wheel=$(ls -t dist/fastkm-*+cpu-*.whl | head -n 1)

if [ ! -e "$rootfs/usr/bin/python3" ]; then
  debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates bookworm "$rootfs"
fi
mkdir -p "$rootfs/wheels" "$rootfs/src"
cp "$wheel" "$rootfs/wheels/"
[ -z "${WHEELS:-}" ] || cp "$WHEELS"/*.whl "$rootfs/wheels/"
cp /etc/resolv.conf "$rootfs/etc/resolv.conf"
cp /etc/ssl/certs/ca-certificates.crt "$rootfs/etc/ssl/certs/ca-certificates.crt" # where a proxy signs
git ls-files -z | tar c --null -T - | tar x -C "$rootfs/src"

mounted() { for name in proc dev; do umount "$rootfs/$name" 2>/dev/null || true; done; }
trap mounted EXIT
mount -t proc proc "$rootfs/proc"
mount --bind /dev "$rootfs/dev"

PIP_FIND_LINKS=/wheels chroot "$rootfs" /bin/bash -euo pipefail -s "/wheels/$(basename "$wheel")" "${TORCH:-torch}" <<'INSIDE'
export HOME=/root PATH=/usr/local/bin:/usr/bin:/bin PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
say() { printf '\n== %s\n' "$*"; }
cd /root
say "$(. /etc/os-release; echo "$PRETTY_NAME"), $(python3 --version), compilers: $(ls /usr/bin | grep -cE '^(gcc|g\+\+|cc|c\+\+|clang)' || true)"

say "the wheel: pip install $(basename "$1")[bench] $2"
rm -rf wheel source
python3 -m venv wheel
wheel/bin/python -m pip --version
wheel/bin/python -m pip install --quiet "$1[bench]" "$2"
wheel/bin/python -c 'import fastkm; print("import fastkm", fastkm.__version__, "from", fastkm.__file__)'
wheel/bin/python -m fastkm doctor
wheel/bin/python -m fastkm check --presets S M 2>/dev/null | tail -n 3

say "the sources, with the pip and setuptools of Debian"
python3 -m venv source
. source/bin/activate
# What the wheel brought serves here as well: torch and what it needs.
site=$(echo /root/wheel/lib/python3*/site-packages)
rm -rf borrowed && mkdir borrowed
for part in "$site"/*; do
  case ${part##*/} in fastkm* | pip* | setuptools* | pkg_resources* | _distutils_hack | distutils-precedence*) ;; *) ln -s "$part" borrowed/ ;; esac
done
echo /root/borrowed >"$(echo source/lib/python3*/site-packages)/borrowed.pth"
pip install --quiet setuptools wheel
pip list 2>/dev/null | grep -E '^(pip|setuptools|wheel|torch) '
cd /src
say "pip install --no-build-isolation ."
if pip install --no-build-isolation . >/root/said 2>&1; then echo "it installed without a compiler"; exit 1; fi
grep 'fastkm: ' /root/said
say "FASTKM_NO_EXT=1 pip install --no-build-isolation ."
FASTKM_NO_EXT=1 pip install --no-build-isolation . 2>&1 | tail -n 1
cd /root
python -m fastkm doctor | grep -E '^(fastkm|torch|extension)'
python -m fastkm check --presets S 2>/dev/null | tail -n 1
INSIDE
