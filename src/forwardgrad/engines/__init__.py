"""Ways to take a step of training: as it is written, or as a graph that was made of it once."""
