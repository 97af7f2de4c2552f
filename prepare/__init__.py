"""Raw sources -> samples by split, with a report."""
