"""The test suite. `pytest` runs what the machine can run; tests marked `gpu` need a GPU."""
