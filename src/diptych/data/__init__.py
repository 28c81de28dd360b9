"""Rows and where they live: schemas (`records`), parquet folders (`store`), the loop over them (`engine`), images."""
