"""`python -m flowad_fast.benchmarks.demo`."""

from flowad_fast.benchmarks.demo.demo import main

if __name__ == "__main__":
    main()
