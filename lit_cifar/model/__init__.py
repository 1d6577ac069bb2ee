"""The module that trains a net, the classifier that uses a trained one, and the optimiser. nets/ has the layers."""
