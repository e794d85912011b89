"""How long batches and models alone take, measured in turns."""

from .lenet import run_benchmark
from .result import BenchmarkResult

__all__ = ["BenchmarkResult", "run_benchmark"]
