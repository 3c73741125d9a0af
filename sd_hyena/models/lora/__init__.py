"""LoRAs and their kin: read from a file, counted against the model, applied, and taken back bit for bit."""
