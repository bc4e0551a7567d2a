"""The methods, one file per paper, with the state they share, the sums and the server steps."""
