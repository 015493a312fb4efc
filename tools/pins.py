"""Print what pip must not change in the environment of this Python: a constraint file, for ``pip install -c``.

Torch stays as it is, and so does the Triton that it brought. The interpreter of Triton 3.6 needs NumPy before 2.4.
"""

from importlib.metadata import PackageNotFoundError, version

for package in ("torch", "triton"):
    try:
        print(f"{package}=={version(package)}")
    except PackageNotFoundError:
        continue
    if package == "triton" and version(package).startswith("3.6."):
        print("numpy<2.4")
