"""Linking against an older glibc than the one that is there, for wheels that many systems can load.

A linker gives a library the newest version of each glibc symbol. ``write_stubs`` makes shared libraries that have the
names of those of glibc and define an older version of these symbols, which the linker then takes. At run time the real
glibc serves it, for it keeps all versions.
"""

import re
import subprocess
from collections import defaultdict
from itertools import chain
from pathlib import Path

# Where glibc had these functions before 2.34, when it moved them into libc.so.6.
FORMER = {"libpthread.so.0": ("pthread_", "sem_"), "libdl.so.2": ("dl",), "librt.so.1": ("shm_", "timer_", "mq_")}

# Variables that no older glibc has, with what stands for them. The C++ library counts references without atomic
# instructions while this one is true; a library that has threads may always say that it is false.
REPLACED = {"__libc_single_threaded": "char __libc_single_threaded = 0;"}

SYMBOL = re.compile(r"\s(\*UND\*|\S+)\s+[0-9a-f]{16}\s+\(?GLIBC_([0-9.]+)\)?\s+(?:0x\w+\s+)?(\S+)$", re.M)


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def symbols(library: Path, *, undefined: bool) -> list[tuple[str, str]]:
    """Name and glibc version of the symbols that a library needs, or defines."""
    listed = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    return [(name, version) for section, version, name in SYMBOL.findall(listed) if (section == "*UND*") == undefined]


def too_new(library: Path, limit: str) -> list[str]:
    """The glibc symbols that a library needs in a version after ``limit``."""
    return sorted({name for name, version in symbols(library, undefined=True) if number(version) > number(limit)})


def write_stubs(library: Path, limit: str, folder: Path) -> list[str]:
    """Make what a linker needs to take the symbols of ``library`` in a version up to ``limit``; returns its flags."""
    folder.mkdir(parents=True, exist_ok=True)
    names = too_new(library, limit)
    stubs = versions_up_to(library, limit)
    changed = [
        soname for soname, versions in stubs.items() if any(set(group) & set(names) for group in versions.values())
    ]
    served = set(chain(*(chain(*versions.values()) for versions in stubs.values())))
    if lost := [name for name in names if name not in served and name not in REPLACED]:
        raise SystemExit(f"no version up to glibc {limit} of {', '.join(lost)}")
    # A library that is dropped when nothing before it needs it would not serve the archives that come later.
    flags = ["-Wl,--push-state,--no-as-needed", f"-L{folder}"]
    flags += [f"-l:{write_stub(soname, stubs[soname], folder)}" for soname in changed]
    return [*flags, "-Wl,--pop-state", *(write_replacement(name, folder) for name in names if name in REPLACED)]


def versions_up_to(library: Path, limit: str) -> dict[str, dict[str, list[str]]]:
    """What a library needs of glibc as an older linker would name it: for each file and version, the symbols."""
    wanted: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    needed = dict(symbols(library, undefined=True))
    for soname in ("libc.so.6", "libm.so.6"):
        versions = defaultdict(list)
        for name, version in symbols(Path(compiler_file(soname)), undefined=False):
            if name in needed and number(version) <= number(limit):
                versions[name].append(version)
        for name, known in versions.items():
            if number(needed[name]) <= number(limit):
                wanted[soname][needed[name]].append(name)
            else:
                former = (file for file, prefixes in FORMER.items() if name.startswith(prefixes))
                wanted[next(former, soname)][max(known, key=number)].append(name)
    return wanted


def compiler_file(name: str) -> str:
    return subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def write_stub(soname: str, versions: dict[str, list[str]], folder: Path) -> str:
    """A library of this name that defines each symbol in its version, and does nothing."""
    source, script = folder / f"{soname}.c", folder / f"{soname}.map"
    source.write_text(
        "".join(f"void {name}(void) {{}}\n" for names in versions.values() for name in names), encoding="utf-8"
    )
    script.write_text(
        "".join(f"GLIBC_{v} {{ global: {'; '.join(names)}; }};\n" for v, names in versions.items()), encoding="utf-8"
    )
    command = ["gcc", "-w", "-fno-builtin", "-shared", "-nostdlib", f"-Wl,-soname,{soname}"]
    subprocess.run([*command, f"-Wl,--version-script={script}", source, "-o", folder / soname], check=True)
    return soname


def write_replacement(name: str, folder: Path) -> str:
    """An object with a variable of this name, which stays inside the library that is linked."""
    made = folder / f"{name}.o"
    command = ["gcc", "-fPIC", "-fvisibility=hidden", "-x", "c", "-c", "-", "-o", made]
    subprocess.run(command, input=REPLACED[name], text=True, check=True)
    return str(made)
