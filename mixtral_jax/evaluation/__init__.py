"""The benchmarks of the papers, through EleutherAI's evaluation harness."""
