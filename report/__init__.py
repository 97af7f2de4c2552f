"""Predictions -> scores, intervals, comparison, plots and a page."""
