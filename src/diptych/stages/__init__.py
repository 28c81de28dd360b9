"""The stages of a run: write, paint, curate, distill. Each maps rows to rows, independent of files and machines."""
