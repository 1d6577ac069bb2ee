"""What goes on around the steps of a training run: the loop, its figures, warnings and dashboards."""
