"""What quality a configuration costs, on tasks, with everything it saves beside it.

python -m benchmarks.accuracy --help
"""
