"""A tiny model and a drawn image set, so that everything runs without a download."""
