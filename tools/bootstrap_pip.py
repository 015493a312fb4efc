"""Put pip into an environment made by ``python3 -m venv --without-pip``, with nothing but the standard library.

Debian's python3 comes without ensurepip. One pip wheel is downloaded from the package index and held to the SHA-256
written here; everything after that is pip's. ``PIP_INDEX_URL`` names another index, as it does for pip.
"""

import hashlib
import json
import os
import ssl
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urljoin

WHEEL = "pip-26.1.2-py3-none-any.whl"
SHA256 = "382ff9f685ee3bc25864f820aa50505825f10f5458ffff07e30a6d96e5715cab"
PYPI = "https://pypi.org/simple"


def download(url: str, accept: str = "*/*") -> bytes:
    request = urllib.request.Request(url, headers={"Accept": accept})
    try:
        return urllib.request.urlopen(request, timeout=60).read()
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLCertVerificationError) or "PIP_INDEX_URL" in os.environ:
            raise
        # A bare machine has no certificates to verify with. The hash below vouches for what is downloaded.
        return urllib.request.urlopen(request, timeout=60, context=ssl._create_unverified_context()).read()


def pip_wheel() -> bytes:
    page = os.environ.get("PIP_INDEX_URL", PYPI).rstrip("/") + "/pip/"
    files = json.loads(download(page, accept="application/vnd.pypi.simple.v1+json"))["files"]
    url = next(file["url"] for file in files if file["filename"] == WHEEL)
    wheel = download(urljoin(page, url))
    if hashlib.sha256(wheel).hexdigest() != SHA256:
        raise ValueError(f"{url} does not have the SHA-256 {SHA256}")
    return wheel


def main() -> None:
    try:
        wheel = pip_wheel()
    except (OSError, ValueError, KeyError, StopIteration) as error:
        sys.exit(
            f"This Python has no ensurepip, and {WHEEL} could not be had from the package index: {error!r}\n"
            "Remedy: apt-get install python3-venv (or a Python that comes with ensurepip), then make setup"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, WHEEL)
        path.write_bytes(wheel)
        subprocess.run([sys.executable, f"{path}/pip", "install", "--quiet", "--no-index", str(path)], check=True)


if __name__ == "__main__":
    main()
