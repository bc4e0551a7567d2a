"""E2E's five scores, as the official scorer computes them."""
