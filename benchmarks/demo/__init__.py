"""The main job on real photos, end to end: `python -m flowad_fast.benchmarks.demo`."""
