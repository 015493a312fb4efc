#!/bin/bash
# Cases of the command line and of installing that users reported. Each passes when the behaviour is right.
#   cases.sh              every quick case (about three minutes)
#   cases.sh NAME ...     those
#   SLOW=1 cases.sh       also those that compile the whole extension (a minute each)
# PY: a Python with fastkm, torch and the bench extra. SRC: the repository, which is cloned and never written to.
PY=${PY:-$PWD/.venv/bin/python}
SRC=${SRC:-$PWD}
W=$(mktemp -d)
trap 'rm -rf "$W"' EXIT
export PYTHONDONTWRITEBYTECODE=1 MAX_JOBS=1
FAST="--steps 3 --batch 1 --patterns 4 --rows 4 --code-size 4 --width 1 --threads 1 --checkpoint-every 0"
CHECK="check --presets S --threads 1"
cd "$W" || exit 1

run() {  # train and study are commands of the example application, the others of the package
  local module=fastkm
  case $1 in train | study) module=examples.dkm.$1; shift ;; esac
  PYTHONPATH=$SRC nice -n 5 timeout "${LIMIT:-120}" "$PY" -m "$module" "$@" >out 2>err
}
# refused in words: status 2, one line, no traceback
refused() { run "$@"; local rc=$?; [ $rc = 2 ] && ! grep -q Traceback err; }
strokes() {  # DIR: 20 readable grey PNGs
  "$PY" - "$1" <<'P'
import os, sys
from PIL import Image, ImageDraw
os.makedirs(sys.argv[1], exist_ok=True)
for i in range(20):
    im = Image.new("L", (28, 28)); ImageDraw.Draw(im).line((i, 2, 27 - i, 25), 255, 3)
    im.save(f"{sys.argv[1]}/{i:02}.png")
P
}
pixels() {  # PATH ...: what the package reads there, as one digest a line
  "$PY" - "$@" <<'P'
import hashlib, sys
from pathlib import Path
from fastkm.testing.images import read_pngs
for path in sys.argv[1:]:
    names, x, _ = read_pngs(Path(path)); print(len(names), hashlib.sha256(x.float().numpy().tobytes()).hexdigest()[:12])
P
}
same() { pixels "$@" 2>err | sort -u | wc -l | grep -qx 1 && [ ! -s err ]; }
patched() {  # ZIP OUT OFFSET_LOCAL OFFSET_CENTRAL EXPRESSION: rewrite a byte b of every header
  "$PY" - "$@" <<'P'
import sys
source, out, local, central, expression = sys.argv[1:]
data = bytearray(open(source, "rb").read())
for sign, at in ((b"PK\3\4", int(local)), (b"PK\1\2", int(central))):
    i = data.find(sign)
    while i >= 0:
        data[i + at] = eval(expression, {"b": data[i + at]}); i = data.find(sign, i + 4)
open(out, "wb").write(data)
P
}
zipped() { (cd "$1" && "$PY" -m zipfile -c "$W/$2" ./*.png); }
clone() { cd "$W" && rm -rf "$W/$1" && git clone -q "$SRC" "$W/$1"; }
plain() {  # a virtual environment in $W/$1 with everything PY has but fastkm, less what matches $2 (an extended pattern)
  local site; site=$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  mkdir -p "$W/site_$1"
  for p in "$site"/*; do
    [[ ${p##*/} =~ fastkm|${2:-^nothing$} ]] || ln -sfn "$p" "$W/site_$1/${p##*/}"
  done
  "$("$PY" -c 'import sys; print(sys._base_executable)')" -m venv --without-pip "$W/$1"
  echo "$W/site_$1" >"$(echo "$W/$1"/lib/python3*/site-packages)/zz.pth"
}
install() { nice -n 5 timeout 900 env "$@" "$W/v/bin/python" -m pip install -v --no-build-isolation --no-deps --target "$W/t" . >log 2>&1; }

# ---- data files ---------------------------------------------------------------------------------------------------

case_48_sixteen_bit_pngs() {  # read as the same picture with 8 bits
  "$PY" - <<'P'
import os, numpy as np
from PIL import Image
for name in ("sixteen", "eight"): os.makedirs(name, exist_ok=True)
for i in range(20):
    a = np.full((28, 28), 2056, np.uint16); a[:, i] = 59881; a[i] = 30069  # multiples of 257
    Image.fromarray(a).save(f"sixteen/{i:02}.png"); Image.fromarray((a // 257).astype(np.uint8)).save(f"eight/{i:02}.png")
P
  same sixteen eight
}
case_49_transparent_pngs() {  # composed over white, then the ink is found: as the same strokes in opaque black on white
  "$PY" - <<'P'
import os, numpy as np
from PIL import Image, ImageDraw
for name in ("opaque", "rgba", "la", "palette", "grey_trns"): os.makedirs(name, exist_ok=True)
for i in range(20):
    im = Image.new("L", (28, 28)); ImageDraw.Draw(im).line((i, 2, 27 - i, 25), 255, 3); s = np.array(im); f = f"{i:02}.png"
    Image.fromarray(255 - s).save("opaque/" + f)
    z = np.zeros((28, 28, 4), np.uint8); z[..., 3] = s; Image.fromarray(z).save("rgba/" + f)
    Image.fromarray(np.stack([0 * s, s], -1)).save("la/" + f)
    p = Image.fromarray((s > 0).astype(np.uint8)).convert("P"); p.putpalette([0] * 6); p.save("palette/" + f, transparency=0)
    Image.fromarray((s > 0).astype(np.uint8)).save("grey_trns/" + f, transparency=0)
P
  same opaque rgba la palette grey_trns
}
case_49_a_training_on_nothing_is_refused() {  # `check` says that all images are the same, `train` goes on for hours
  "$PY" -c "
import os; from PIL import Image; os.makedirs('blank', exist_ok=True)
for i in range(20): Image.new('L', (28, 28)).save(f'blank/{i}.png')"
  refused train $FAST --data blank --checkpoint b.safetensors
}
case_50_unknown_compression() { strokes s; zipped s ok.zip; patched ok.zip d64.zip 8 10 9; refused $CHECK --data d64.zip; }
case_51_encrypted() { strokes s; zipped s ok.zip; patched ok.zip enc.zip 6 8 'b | 1'; refused $CHECK --data enc.zip; }
case_51_damaged() {
  strokes s; zipped s ok.zip
  "$PY" -c "
b = bytearray(open('ok.zip', 'rb').read()); b[56] ^= 255; b[57] ^= 255; open('crc.zip', 'wb').write(b)
b = bytearray(open('ok.zip', 'rb').read()); b[0] = 0; open('head.zip', 'wb').write(b)"
  refused $CHECK --data crc.zip && refused $CHECK --data head.zip
}
case_52_names_with_backslashes() {
  "$PY" - <<'P'
import io, zipfile
from PIL import Image, ImageDraw
for sep, out in (("/", "forward.zip"), ("\\", "back.zip")):
    with zipfile.ZipFile(out, "w") as z:
        for c in range(12):
            for j in range(3):
                im = Image.new("L", (28, 28)); ImageDraw.Draw(im).line((2 * c, 2 + j, 27 - 2 * c, 25 - j), 255, 2 + j)
                b = io.BytesIO(); im.save(b, "png"); info = zipfile.ZipInfo("x"); info.filename = f"c{c:02}{sep}{j}.png"
                z.writestr(info, b.getvalue())
P
  for z in forward back; do run train $FAST --data $z.zip --checkpoint $z.safetensors || return 1; sed 1q out | cut -d';' -f2 >$z.split; done
  cmp -s forward.split back.split
}
case_53_a_large_text_chunk() {  # read, or refused in words
  strokes big
  "$PY" -c "
from PIL import Image, PngImagePlugin as P; t = P.PngInfo(); t.add_text('k', 'x' * 2_000_000, zip=True)
Image.open('big/00.png').save('big/00.png', pnginfo=t)"
  run $CHECK --data big || refused $CHECK --data big
}
case_54_too_many_pixels() { strokes wide; "$PY" -c "from PIL import Image; Image.new('1', (20_000, 10_000)).save('wide/00.png')"; refused $CHECK --data wide; }
case_55_hidden_folders() {
  strokes clean; strokes hidden
  for d in .ipynb_checkpoints .thumbnails @eaDir __MACOSX; do mkdir -p hidden/$d; cp clean/00.png hidden/$d/copy.png; done
  same clean hidden
}
case_f_a_folder_named_like_a_png_in_a_zip() {
  strokes s
  "$PY" -c "
import pathlib, zipfile
with zipfile.ZipFile('dir.zip', 'w') as z:
    z.writestr('x.png/', b'')
    for f in sorted(pathlib.Path('s').glob('*.png')): z.write(f, 'x.png/' + f.name)"
  run $CHECK --data dir.zip
}

# ---- commands -----------------------------------------------------------------------------------------------------

case_56_a_terminal_that_is_not_utf8() {
  strokes s
  for c in doctor roofline "$CHECK --data s" "train $FAST --data s --checkpoint a.safetensors"; do
    PYTHONIOENCODING=ascii run $c || return 1
  done
}
case_56_files_in_utf8() {  # after the timing, bench.md is empty
  strokes s
  LIMIT=300 LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 PYTHONIOENCODING=utf-8 \
    run bench --quick --presets S --batch 1 --threads 1 --data s --output o && [ -s o/bench.md ]
}
case_57_a_large_seed() { strokes s; run train $FAST --data s --checkpoint c.safetensors --seed 20261012123456 || refused train $FAST --data s --checkpoint c.safetensors --seed 20261012123456; }
case_58_where_the_result_goes() {  # refused before the first step
  strokes s
  for ck in /etc/hostname/x.safetensors "$(printf 'a%.0s' {1..250})" /proc/x.safetensors; do
    refused train $FAST --data s --checkpoint "$ck" && ! grep -q '^train 1' out || return 1
  done
  refused bench --quick --presets S --batch 1 --threads 1 --data s --output /etc/hostname/o
}
case_62_more_threads_than_there_can_be() { strokes s; refused $CHECK --data s --threads 100000; }  # now SIGSEGV
case_d_the_name_of_the_checkpoint() {
  strokes s; strokes images.v1; strokes images.v2; (cd s && run train $FAST --data . && ! ls -A results | grep -qx '.safetensors') || return 1
  run train $FAST --data images.v1 && run train $FAST --data images.v2
}
case_d_study_of_two_folders_of_one_name() {  # refused before anything is trained, or both studied
  strokes a/digits; strokes b/digits; "$PY" -c "from PIL import Image; Image.new('L', (28, 28)).save('b/digits/00.png')"
  LIMIT=300 run study --data a/digits b/digits --steps 2 --ablation-steps 1 --seconds 1 --threads 1 --output st || { refused study --data a/digits b/digits --steps 2 --ablation-steps 1 --seconds 1 --threads 1 --output st2 && ! ls st2 2>/dev/null | grep -q .; }
}
case_e_mnist_by_name() { run $CHECK --data mnist; }

# ---- installing ---------------------------------------------------------------------------------------------------

case_39_old_setuptools() {  # installs, or says which is needed
  plain v39 '^(setuptools|pkg_resources|_distutils_hack|distutils-precedence)'
  "$W/v39/bin/python" -m pip install -q --target "$(echo "$W"/v39/lib/python3*/site-packages)" 'setuptools==66.1.1' wheel >/dev/null 2>&1
  clone s39; cd s39 || return 1
  FASTKM_NO_EXT=1 nice -n 5 "$W/v39/bin/python" -m pip install --no-build-isolation --no-deps --target "$W/t39" . >log 2>&1 || grep -qi 'fastkm.*setuptools.*77' log
}
case_40_older_compilers() {  # builds, or says which g++ is needed
  plain v
  for c in g++-11 clang++; do
    command -v $c >/dev/null || continue
    clone s40; cd "$W/s40" || return 1
    install CXX=$c FASTKM_CUDA=0 || grep -qE 'fastkm: .*(g\+\+|GCC|compiler).*[0-9]' log || { grep -m1 error: log; return 1; }
  done
}
case_41_a_toolkit_that_is_too_old() {
  plain v; mkdir -p fake/bin
  cat >fake/bin/nvcc <<'N'
#!/bin/sh
case "$*" in
  *--list-gpu-arch*) echo compute_80; echo compute_90; exit 0;;
  *compute_100*) echo "nvcc fatal : Unsupported gpu architecture 'compute_100'" >&2; exit 1;;
esac
N
  chmod +x fake/bin/nvcc; clone s41; cd s41 || return 1
  install CUDA_HOME="$W/fake" || grep -q 'fastkm: .*12\.8' log
}
case_42_a_compiler_behind_another() {
  plain v; mkdir -p tools 'my tools'; printf '#!/bin/sh\ncase $1 in -*) echo ccache version 4;; *) exec "$@";; esac\n' >tools/ccache; chmod +x tools/ccache; ln -sfn "$(command -v g++)" 'my tools/g++'
  for cxx in "ccache g++" "g++ -m64" "$W/my tools/g++"; do
    rm -rf t; clone s42; cd "$W/s42" || return 1
    install PATH="$W/tools:$PATH" CXX="$cxx" FASTKM_CUDA=0; [ -e "$W/t/fastkm/_C.abi3.so" ] || { echo "    CXX='$cxx': $(grep -m1 'not found' log)"; return 1; }
    cd "$W" || return 1
  done
}
case_43_free_threaded() {
  plain v; mkdir ft; echo 'import sysconfig; sysconfig.get_config_vars()["Py_GIL_DISABLED"] = 1' >ft/sitecustomize.py
  clone s43; cd s43 || return 1
  PYTHONPATH="$W/ft" FASTKM_CUDA=0 nice -n 5 timeout 20 "$W/v/bin/python" setup.py -q bdist_wheel >log 2>&1; ! grep -q 'py_limited_api=.*not supported' log
}
case_44_without_metadata() { plain v; mkdir vendored; git -C "$SRC" archive HEAD fastkm | tar x -C vendored; PYTHONPATH="$W/vendored" "$W/v/bin/python" -c 'import fastkm; fastkm.__version__' 2>err; }
case_46_no_extension_means_none() {  # an editable checkout with a library of an earlier build
  plain v; clone s46; cp "$("$PY" -c 'import fastkm, os; print(os.path.dirname(fastkm.__file__))')/_C.abi3.so" s46/fastkm/ || return 1
  (cd s46 && FASTKM_NO_EXT=1 nice -n 5 "$W/v/bin/python" -m pip install -q --no-build-isolation --no-deps -e .) >log 2>&1
  "$W/v/bin/python" -m fastkm doctor | grep -q '^extension *not loaded'
}
case_46_a_library_of_another_schema() {  # SLOW: builds the commit before the operators took a precision
  plain v; clone s46b; cd s46b || return 1; git checkout -q e5ee9e4; install FASTKM_CUDA=0 || return 1
  cd "$W" || return 1; mkdir mixed; git -C "$SRC" archive HEAD fastkm | tar x -C mixed; cp t/fastkm/_C.abi3.so mixed/fastkm/
  PYTHONPATH="$W/mixed" "$W/v/bin/python" - <<'P' 2>err
import importlib.metadata as m
real = m.version; m.version = lambda name: "0" if name == "fastkm" else real(name)
import torch, fastkm
assert "another version" in str(fastkm._runtime.schema.unavailable), fastkm._runtime.schema.unavailable
fastkm.read(torch.randn(2, 4, 6), torch.randn(2, 5, 6), 1.0)
P
}
case_30_flags_of_the_environment() {  # SLOW: the import leaves subnormals alone, and the base level runs anywhere
  plain v
  for flags in CXXFLAGS CFLAGS; do
    rm -rf t; clone s30; cd "$W/s30" || return 1
    install $flags="-Ofast -march=native" FASTKM_CUDA=0 || { grep -q 'fastkm: .*fast' log && cd "$W" && continue; return 1; }
    cd "$W" || return 1
    PYTHONPATH="$W/t" "$W/v/bin/python" -c 'import torch, fastkm; assert 5e-324 * 1.0 > 0' 2>err || { echo "    $flags: importing fastkm flushes subnormals"; return 1; }
    objdump -d -C --no-show-raw-insn t/fastkm/_C.abi3.so | awk '/>:$/ {f = $0} /zmm/ && f ~ /base/ {n = 1} END {exit n}' || { echo "    $flags: AVX-512 in the base level"; return 1; }
  done
}
case_47_no_compiler_is_said() {  # README: "installs the reference alone, and says so"; pip without -v shows nothing
  plain v; clone s47; cd s47 || return 1
  CXX=/nowhere/g++ nice -n 5 "$W/v/bin/python" -m pip install --no-build-isolation --no-deps --target "$W/t" . 2>&1 | grep -q 'without the C++ extension'
}
case_61_states_of_older_safetensors() {  # what was loaded stays, and is what is saved
  plain v
  for version in 0.8.0rc0 0.7.0 0.4.0; do
    "$W/v/bin/python" -m pip install -q --no-deps --only-binary :all: --target "$W/st_$version" "safetensors==$version" >/dev/null 2>&1 || continue
    PYTHONPATH="$W/st_$version" "$PY" - "$W/state.safetensors" <<'P' 2>err || { echo "    safetensors $version: $(tail -n 1 err)"; return 1; }
import sys, torch
from fastkm import MemoryState, load_memory_state, save_memory_state
path, s = sys.argv[1], MemoryState(torch.randn(8, 64, 200), torch.eye(64).repeat(8, 1, 1))
save_memory_state(s, path); t = load_memory_state(path); save_memory_state(t, path)
assert torch.equal(load_memory_state(path).mean, s.mean) and torch.equal(t.mean, s.mean), "saved over itself: lost"
u = load_memory_state(path); save_memory_state(MemoryState(-s.mean, s.cov), path)
assert torch.equal(u.mean, s.mean), "a loaded state changed when its file was written again"
P
  done
}

SLOW_CASES=" case_30_flags_of_the_environment case_46_a_library_of_another_schema "
names=("$@")
[ $# = 0 ] && mapfile -t names < <(declare -F | awk '{print $3}' | grep '^case_')
failed=0
for name in "${names[@]}"; do
  if [ $# = 0 ] && [ -z "$SLOW" ] && [[ $SLOW_CASES == *" $name "* ]]; then echo "skip $name (SLOW=1)"; continue; fi
  rm -rf "$W/d"; mkdir "$W/d"; keep=$W; W=$W/d; cd "$W" || exit 1
  if ( "$name" ) 2>/dev/null; then echo "pass $name"; else echo "FAIL $name: $(tail -n 1 "$W/err" 2>/dev/null | cut -c1-110)"; failed=$((failed + 1)); fi
  W=$keep; cd "$W" || exit 1
done
echo "$failed fail"
[ $failed = 0 ]
