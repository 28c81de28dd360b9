"""The reports: of a run (`run_report`) and of an evaluation on a suite (`suite_report`), from the same templates."""
