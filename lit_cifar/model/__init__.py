"""The module that trains, the classifier that is left of it, the optimiser. Layers are in nets/."""
