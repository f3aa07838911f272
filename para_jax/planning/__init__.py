"""What training and decoding take on hardware that is not here: memory, collectives, and an estimate of time."""
