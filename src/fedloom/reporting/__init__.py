"""What a run leaves behind: its folder, its costs, its tables, its progress."""
