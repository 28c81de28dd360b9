"""A run of a recipe: its stages in order, resumed, taken over, curated anew, and planned before it costs anything."""
