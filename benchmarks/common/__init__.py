"""What every benchmark uses: its machine, results, tables, arguments and pictures."""
