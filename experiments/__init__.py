"""Scripts over StreamServe, each run as `python -m experiments.NAME`."""
