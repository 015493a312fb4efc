"""All planted faults."""

from mutants.faults_cpu import CPU
from mutants.faults_gpu import CUDA, TRITON
from mutants.faults_python import PYTHON

FAULTS = (*PYTHON, *CPU, *CUDA, *TRITON)
