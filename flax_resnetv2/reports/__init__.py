"""What people look at afterwards: run pages, comparisons and sweeps."""
