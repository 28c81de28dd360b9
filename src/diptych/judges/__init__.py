"""The judges: models that look at panels. `embedding` says how alike two subjects are, `attributes` what a picture
shows. The judge that curates a student's data is never the one that scores the student."""
