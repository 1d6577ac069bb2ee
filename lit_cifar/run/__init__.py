"""A run on the disk: its folder, the states in it, stopping and going on. Training logic is not here."""
