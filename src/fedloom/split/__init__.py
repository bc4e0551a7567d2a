"""Split training: the plan, the loop, both sides of the cut, what crosses it, what it costs and gives away."""
