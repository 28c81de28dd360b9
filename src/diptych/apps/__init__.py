"""Applications of a student: images, batches, relighting, stories; and the audit of a run's pairs."""
