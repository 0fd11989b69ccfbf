"""What quality a configuration costs, on tasks, and what it saves.

python -m benchmarks.accuracy --help
"""
