"""The low-rank algebra: pairs and adapters, operations on them, the layer that trains them, PEFT files."""
