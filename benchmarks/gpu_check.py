"""`python -m flowad_fast.benchmarks.gpu_check`; see `runs/gpu_check.py`."""

from flowad_fast.benchmarks.runs.gpu_check import main

if __name__ == "__main__":
    main()
