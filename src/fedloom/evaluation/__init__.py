"""Scores: perplexity, multiple choice, E2E's metrics, judges, and how far each figure can be trusted."""
