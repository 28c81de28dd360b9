"""The origin of images and students: traced through a run, signed with C2PA, published with a card and a license."""
