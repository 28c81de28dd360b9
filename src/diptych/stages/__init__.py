"""The stages of a run: write, paint, curate, distill. Each maps rows to rows and knows nothing of files or machines."""
