"""Reports for people: run pages, comparisons of runs, reconstructions and sweeps."""
