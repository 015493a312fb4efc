"""How setup.py builds the compiled library. Nothing here is installed.

``compiler`` finds the C++ compiler and its flags, ``cuda`` the CUDA toolkit, ``objects`` compiles and links what is out
of date, ``facts`` writes down what is being built, and ``commands`` are the commands of setuptools made of these.
"""
