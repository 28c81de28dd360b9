"""A run of a recipe: its stages in order, resumed, taken over, curated again, and planned before it costs anything."""
