"""Compiles every Triton kernel for every GPU target and looks at what came out; see README.md."""
