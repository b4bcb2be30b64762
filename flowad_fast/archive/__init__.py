"""Archives of photos judged again by Ray Data: on the cores of one computer, or on a cluster.

`sources.py` lists what is to be judged, `store.py` keeps the rows as Parquet, `cluster.py` is all that knows Ray,
`worker.py` runs in its actors, and `inspecting.py` and `evaluating.py` are the two jobs.
"""
