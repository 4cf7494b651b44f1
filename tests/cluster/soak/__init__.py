"""`make soak`: a run on a real Slurm of four nodes that suffers seeded faults, one after the other."""
