"""The maths of the flow: path, solvers, guidance. Pure torch."""
