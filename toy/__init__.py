"""A tiny model and a drawn picture set, so that everything runs without a download."""
