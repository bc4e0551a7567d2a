"""What can be done with a finished run or any adapter: scores, text, export, judgement."""
