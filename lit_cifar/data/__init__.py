"""From files to batches on the device. The model is not known here."""
