"""Judges over OpenAI's chat protocol: prompts, questions, requests, verdicts."""
