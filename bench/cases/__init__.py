"""What is timed: workloads, their inputs, the contenders, and the results that theirs are held against."""
