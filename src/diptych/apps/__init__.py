"""What people do with a student: pictures, batches, other light, stories; and the audit of a run's pairs."""
