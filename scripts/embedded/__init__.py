"""The making of fedloom's embedded model and data: an invented world, its tasks, its prose, and a small Llama."""
