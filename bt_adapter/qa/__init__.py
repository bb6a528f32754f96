"""Question answering on public benchmarks: answers, exact scores, and scores given by a judge."""
