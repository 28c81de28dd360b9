"""Where a picture comes from: traced through a run, signed with C2PA, published with its card and licence."""
