"""What a recipe would train, send, hold and cost, before anything is trained."""
