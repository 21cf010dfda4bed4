"""What the records say: measures, correctness, whether the run is valid, and the verdict on the requirements."""
