"""What every part of diptych uses: paths, documents, the console, the machine, and the safe opening of models."""
