"""What differs between the teachers that diptych opens, as tables."""
